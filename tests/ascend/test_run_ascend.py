"""scripts/run_ascend.sh as people run it, in a process of its own: on the emulated NPU, and on a bare machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_rounding import FusedRounding

from quasar import generate
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.loader import build_decoder
from quasar.models.model import Model, load_tokenizer
from quasar_npu import check

ROOT = Path(__file__).parents[2]
PROMPT = "class Stack:\n    def push"


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", "scripts/run_ascend.sh", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def emulated(cache):
    """The first run: it quantises, then generates."""
    options = {"QUASAR_ASCEND_EMULATED": "1", "QUASAR_VENV_ASCEND": sys.prefix, "XDG_CACHE_HOME": str(cache)}
    return run("--json", "--max-new-tokens", "24", "--ignore-eos", PROMPT, **options)


def test_it_runs_to_the_end_with_the_ids_of_the_cpu(emulated, cache):
    assert emulated.returncode == 0, emulated.stderr
    said = json.loads(emulated.stdout.splitlines()[-1])
    assert said["settings"]["device"] == "npu:0"
    assert said["settings"]["precision"] == "w8a8"
    assert len(said["token_ids"]) == 24
    assert said["text"].strip()
    folder = cache / "quasar" / "tiny-openpangu-w8a8"
    model = on_cpu(folder)
    ids = generate(model, PROMPT, max_new_tokens=24, draft="none", ignore_eos=True).result().token_ids
    assert said["token_ids"] == ids


def on_cpu(folder):
    """The quantised folder on the CPU, with the NPU's rounding."""
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    decoder = build_decoder(config, open_checkpoint(folder), FusedRounding("cpu", torch.bfloat16))
    return Model(str(folder), decoder, tokenizer, frozenset(), "w8a8")


def test_it_says_what_it_found_and_quantises_once(emulated, cache):
    assert "ok      NPU 0: Ascend910B2 (A2 or A3: dynamic W8A8, bfloat16)" in emulated.stderr
    assert f"quantising tiny-openpangu into {cache}/quasar/tiny-openpangu-w8a8 (once)" in emulated.stderr
    assert (cache / "quasar" / "tiny-openpangu-w8a8" / "quant_model_description.json").exists()


def test_check_only_reports():
    done = run("--check", QUASAR_ASCEND_EMULATED="1", QUASAR_VENV_ASCEND=sys.prefix)
    assert done.returncode == 0
    assert done.stdout == ""
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["ok"] * 4


def test_a_bare_machine_gets_a_line_for_each_missing_piece(tmp_path):
    done = run("--check", PYTHON=sys.executable, HOME=str(tmp_path), ASCEND_TOOLKIT_HOME="")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "MISSING CANN",
        "MISSING NPU driver",
        "MISSING npu-smi",
        "MISSING torch-npu does not load (libhccl.so",
    ]
    assert all("install" in line or "driver" in line for line in lines)


def test_flags_that_lack_a_value_are_one_line():
    done = run("--model")
    assert (done.returncode, done.stderr) == (2, "run_ascend.sh: --model needs a folder or a name\n")


def test_cann_s_version_is_read_and_judged(monkeypatch, tmp_path):
    monkeypatch.delenv("QUASAR_ASCEND_EMULATED", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert check._cann() == (
        False,
        "CANN: no version file under ASCEND_TOOLKIT_HOME: install the CANN toolkit and source set_env.sh",
    )
    (tmp_path / "aarch64-linux").mkdir()
    file = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    file.write_text("package_name=Ascend-cann-toolkit\nversion=8.1.RC1\ninnerversion=V100R001\n")
    assert check._cann() == (True, "CANN 8.1.RC1")
    file.write_text("version=7.0.0\n")
    assert check._cann() == (False, "CANN 7.0.0: install 8.1 or later")


def test_versions_and_memory_that_do_not_fit_are_findings(monkeypatch):
    monkeypatch.setenv("QUASAR_ASCEND_EMULATED", "1")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.1.post1")
    monkeypatch.setattr(torch.npu, "mem_get_info", lambda index=0: (1_000_000, 64_000_000_000))
    lines = [line for right, line in check.findings("tiny-openpangu") if not right]
    ours = torch.__version__.partition("+")[0]
    assert lines[0] == f"torch {ours}, torch-npu 2.5.1.post1: pip install torch-npu=={ours}"
    assert lines[1].endswith("NPU 0 has 0.0 GB free: stop other processes on it")
    assert len(lines) == 2
