#!/usr/bin/env python
"""Mutation testing: changes one operator, number or word of the source at a time; a test should fail each time.

    python scripts/mutate.py common/speculation --log mutants.jsonl
    python scripts/mutate.py common/speculation/rows.py --log mutants.jsonl --each 1 --show

The mutants are cosmic-ray's (pip install cosmic-ray); the runner is our own, since a process of its own for each
mutant would spend most of its time on `import torch`: here a process that has torch forks for each, and the fork
imports Quasar with one module changed. Tests run from the nearest to the farthest (TESTS) until one fails. The log has
a line for each mutant; a run that was interrupted goes on from it, and asks again where the source has changed since.
Of the many replacements of one operator, --each are taken. Type annotations are not mutated.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
# Of a folder, the tests that a change may break: near and quick ones first. Those of a row run together.
TESTS: dict[str, list[list[str]]] = {
    "common/speculation": [
        ["tests/speculation"],
        ["tests/test_generation.py"],
        ["tests/engine/test_engine.py", "tests/engine/test_worth.py"],
        ["tests/test_any_drafter_any_verifier.py", "-k", "not shipped"],
    ],
    "common/drafting": [
        ["tests/drafting"],
        ["tests/test_generation.py"],
        ["tests/test_any_drafter_any_verifier.py", "-k", "not shipped"],
    ],
    "common/quantization": [["tests/quantization"]],
    "common/text.py": [["tests/test_text.py"], ["tests/test_generation.py"]],
}
# Words that are not Python's own semantics: names of exceptions, and loops that run no time, fail by themselves.
_LEFT_OUT = ("no-op", "variable-inserter", "VariableReplacer", "NoOp", "VariableInserter", "RemoveDecorator")
_PASSED, _FAILED = 0, 1
_MOST_SECONDS, _TICK = 120, 0.02
_QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # what was imported before the fork
_SAID = Path(tempfile.gettempdir()) / f"quasar-mutant-{os.getpid()}.txt"  # by the last tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_DIR")
    parser.add_argument("--log", required=True, type=Path)
    parser.add_argument("--each", type=int, default=2, metavar="N", help="replacements of an operator (default: 2)")
    parser.add_argument("--near", action="store_true", help="ask the nearest tests alone")
    parser.add_argument("--show", action="store_true", help="show what the log says of these files; run nothing")
    args = parser.parse_args()
    files = [
        file for path in map(Path, args.paths) for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])
    ]
    for file in files:
        if not file.is_file():
            parser.error(f"{file}: no such file")
        if not str(file).startswith(tuple(TESTS)):
            parser.error(f"{file}: tests are known for {', '.join(TESTS)}, as seen from {ROOT}")
    if importlib.util.find_spec("cosmic_ray") is None:
        parser.error("mutants are cosmic-ray's: pip install cosmic-ray")
    known = {row["id"]: row for row in map(json.loads, args.log.read_text().splitlines())} if args.log.exists() else {}
    rows: list[dict[str, Any]] = []
    if not args.show:
        import_what_tests_share()
        require_passing(files, args.near)
    with args.log.open("a") as log:
        for file in files:
            for mutant in mutants(file, args.each):
                row = known.get(mutant["id"])
                if row is None and args.show:
                    continue
                if row is None:
                    row = mutant | judge(file, mutant.pop("code"), args.near)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                rows.append(row)
    _SAID.unlink(missing_ok=True)
    return summary(rows)


def mutants(file: Path, each: int) -> Iterator[dict[str, Any]]:
    """The changed sources of a file, in the order of their lines."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = file.read_text()
    tree, meaning = get_ast(source), _meaning(source)
    found: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for name in sorted(operator_names()):
        if any(word in name for word in _LEFT_OUT):
            continue
        operator = get_operator(name)()
        positions = [position for node in ast_nodes(tree) for position in operator.mutation_positions(node)]
        for occurrence, position in enumerate(positions):
            code = mutate_code(source, operator, occurrence)
            if code is None or _meaning(code) == meaning:
                continue
            diff = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[3:]
            described = f"{file}\n" + "\n".join(diff) + hashlib.sha256(source.encode()).hexdigest()
            identity = hashlib.sha256(described.encode()).hexdigest()[:16]
            kind = name.partition("/")[2].split("_")[0]
            mutant = {"id": identity, "file": str(file), "line": position[0][0], "diff": diff, "code": code}
            found.setdefault((position, kind), []).append(mutant)
    for (position, kind), some in sorted(found.items(), key=lambda item: item[0]):
        yield from random.Random(f"{position}{kind}").sample(some, min(each, len(some)))


def _meaning(source: str) -> str:
    """The syntax tree without annotations; nothing where it is no Python."""

    class Bare(ast.NodeTransformer):
        def visit_arg(self, node: ast.arg) -> ast.arg:
            node.annotation = None
            return node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
            node.returns = None
            self.generic_visit(node)
            return node

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
            node.annotation = ast.Constant(None)
            self.generic_visit(node)
            return node

    try:
        return ast.dump(Bare().visit(ast.parse(source)))
    except SyntaxError:
        return ""


# Running tests.


def import_what_tests_share() -> None:
    """All that is slow to import and holds nothing of Quasar."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401 - as tests/conftest.py

    torch.set_num_threads(1)


def require_passing(files: list[Path], near: bool) -> None:
    """Raises SystemExit unless the tests pass with no mutant at all."""
    for tests in {json.dumps(row): row for file in files for row in tests_of(file, near)}.values():
        clock = time.monotonic()
        code = run(files[0], files[0].read_text(), tests)
        if code != _PASSED:
            said = _SAID.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{said}\npytest {' '.join(tests)}: ends with {code} before anything was changed")
        print(f"pytest {' '.join(tests)}: {time.monotonic() - clock:.1f} s", flush=True)


def tests_of(file: Path, near: bool) -> list[list[str]]:
    return next(tests[: 1 if near else None] for folder, tests in TESTS.items() if str(file).startswith(folder))


def judge(file: Path, code: str, near: bool) -> dict[str, Any]:
    """Killed, by what, or survived."""
    for tests in tests_of(file, near):
        if run(file, code, tests) != _PASSED:
            return {"outcome": "killed", "by": tests[0]}
    return {"outcome": "survived"}


def run(file: Path, code: str, tests: list[str]) -> int:
    """pytest's exit code, in a fork that imports `code` for the file; 137 where it took too long."""
    child = os.fork()
    if not child:
        try:
            silence, said = os.open(os.devnull, os.O_RDONLY), os.open(_SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream, shown in enumerate((silence, said, said)):
                os.dup2(shown, stream)
            os.setsid()
            sys.meta_path.insert(0, _Changed(file, code))
            import hypothesis
            import pytest

            # A failure is enough: none is made smaller. The same examples for every mutant.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
            hypothesis.settings.load_profile("mutants")
            argv = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *_QUIET, *tests]
            os._exit(int(pytest.main(argv)))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(_FAILED)
    for _ in range(int(_MOST_SECONDS / _TICK)):  # time in which the machine pauses us all does not count
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_TICK)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, 9)
    os.waitpid(child, 0)
    return 137


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module of Quasar with another source."""

    def __init__(self, file: Path, code: str) -> None:
        parts = file.with_suffix("").parts
        self.name = ".".join(("quasar", *parts[1:])).removesuffix(".__init__")
        self.file, self.code = file, code

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self.file)
        exec(compile(self.code, str(self.file), "exec"), module.__dict__)


def summary(rows: list[dict[str, Any]]) -> int:
    """Prints the counts and the survivors; 1 where there are any."""
    for file in dict.fromkeys(row["file"] for row in rows):
        counts = Counter(row["outcome"] for row in rows if row["file"] == file)
        print(f"{file}: {sum(counts.values())} mutants, {counts['survived']} survived")
    survivors = [row for row in rows if row["outcome"] == "survived"]
    for row in survivors:
        print(f"\n{row['file']}:{row['line']}\n" + "\n".join(f"    {line}" for line in row["diff"]))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
