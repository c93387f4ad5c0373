"""A few hundred of the fuzzer's cases, and of the kills every third: the rest by hand (docs/reliability.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")

from tests.fuzz.cases import KINDS, run_case

ROOT = Path(__file__).parents[2]
CASES = 12


@pytest.mark.filterwarnings("ignore")  # of other libraries, about spoiled files
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_refusals(kind: str) -> None:
    outcomes = [run_case(1, number, (kind,)) for number in range(CASES)]
    assert set(outcomes) <= {"ran", "refused"}


def test_killed_writers_leave_nothing_that_looks_finished() -> None:
    argv = [sys.executable, "-m", "tests.fuzz.kills", "cache", "store", "--every", "3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 2
