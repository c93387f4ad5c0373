"""A few hundred of the fuzzer's cases, and of the kills every seventh: the rest by hand (docs/reliability.md)."""

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


def test_the_command_reports_crashes_hangs_and_failures_and_goes_on(tmp_path: Path) -> None:
    """Two cases, a log that knows one of them."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"case": 0, "seed": 5, "kind": "http", "outcome": "hang", "failure": "asleep", "mib": 3}\n')
    argv = [sys.executable, "-m", "tests.fuzz", "--kinds", "http", "--cases", "2", "--seed", "5", "--log", str(log)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "2 cases: " in done.stdout
    assert "case 0: hang: asleep" in done.stdout
    assert len(log.read_text().splitlines()) == 2


def test_killed_writers_leave_nothing_that_looks_finished() -> None:
    argv = [sys.executable, "-m", "tests.fuzz.kills", "quantize", "cache", "store", "--every", "7"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 3
