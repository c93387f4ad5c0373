"""An extension that does not fit: one line says so, and what to do."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quasar import QuasarError, load
from quasar.backends.cpu import kernels

ROOT = Path(__file__).parents[3]
SMALL = ROOT / "tests" / "golden" / "small-qwen3"
# The functions of module.c and how many arguments they take, for the number of the interface.
DIGEST = (4, "1de25c3775b7")


def test_the_interface_has_a_number_of_its_own() -> None:
    """Where this fails: raise INTERFACE in module.c and in kernels.py, and write both here."""
    source = (ROOT / "common" / "backends" / "cpu" / "csrc" / "module.c").read_text()
    number = int(re.search(r"^#define INTERFACE (\d+)$", source, re.M).group(1))
    functions = re.findall(r"^FUNCTION\((\w+), (\d+)\)", source, re.M)
    names = re.findall(r'^    (?:FAST\(|\{)"(\w+)", ', source, re.M)
    digest = hashlib.sha256(repr((sorted(functions), sorted(names))).encode()).hexdigest()[:12]
    assert len(functions) > 20 and len(names) > 30
    assert number == kernels.INTERFACE
    assert (number, digest) == DIGEST


@pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
def test_an_extension_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = ModuleType("_kernels")
    stale.INTERFACE = kernels.INTERFACE + 1
    cannot_load = ImportError("undefined symbol:\nPyFoo")
    for found, said in ((stale, "another version"), (cannot_load, "cannot be loaded (undefined symbol: PyFoo)")):

        def find(name: str, found: object = found) -> object:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(kernels, "import_module", find)
        extension, _, problem = kernels._open()
        assert extension is None
        assert problem is not None and said in problem and "pip install" in problem and "\n" not in problem
        monkeypatch.setattr(kernels, "_problem", problem)
        with pytest.raises(QuasarError, match=re.escape(problem)):
            load(SMALL, device="cpu", precision="full")
        load(SMALL, device="reference", precision="full")  # it needs no kernels


def test_no_extension_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleType:
        return importlib.import_module("no_such_module_anywhere")

    monkeypatch.setattr(kernels, "import_module", find)
    assert kernels._open() == (None, None, None)


@pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
def test_an_instruction_set_that_is_not_there() -> None:
    argv = [sys.executable, "-m", "quasar.cli", "generate", "a", "--model", str(SMALL), "--precision", "full"]
    environment = {**os.environ, "QUASAR_NATIVE_ISA": "mmx"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    sets = ", ".join(kernels.instruction_sets())
    assert done.stderr == f"quasar generate: QUASAR_NATIVE_ISA=mmx: this processor runs {sets}\n"
    argv = [sys.executable, "-m", "quasar.cli", "inspect", "--check", str(SMALL)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no: QUASAR_NATIVE_ISA=mmx: this processor runs {sets}" in done.stdout
