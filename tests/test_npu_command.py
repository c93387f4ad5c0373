"""The Ascend command where there is no NPU. What happens where there is one, tests/ascend tests."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from quasar import QuasarError
from quasar.backends import get_backend
from quasar_npu import generate

needs_no_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="torch-npu is installed here"
)


@needs_no_npu
def test_no_npu_is_one_line():
    with pytest.raises(QuasarError, match=r"--device npu: no torch-npu here; pip install torch-npu for torch \d+"):
        get_backend("npu")


@needs_no_npu
def test_the_command_runs_on_cpu_and_says_so(capsys):
    assert generate.run(["import os", "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0].startswith("quasar_npu: no torch-npu here;")
    assert err.splitlines()[0].endswith("running on CPU")
    assert "4 tokens" in err
    assert out.strip()


@needs_no_npu
def test_flags_that_generate_does_not_have_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.run(["--gama", "4", "x"])
    assert stop.value.code == 2
    assert "--gama" in capsys.readouterr().err.splitlines()[-1]


# --- scripts/run_ascend.sh, with a Python that says what a machine's would -------------------------------------

ROOT = Path(__file__).parent.parent
STUB = r"""#!/usr/bin/env bash
case "$*" in
    *"import torch, torch_npu"*) [ -n "$WORKS" ] || [ -n "$SOURCED" ] ;;
    *find_spec*) exit 0 ;;
    *quasar_npu.check*) echo "$CHECK"; ! grep -q ^MISSING <<<"$CHECK" ;;
    *) echo "ran $* TASK_QUEUE_ENABLE=$TASK_QUEUE_ENABLE on ${ASCEND_RT_VISIBLE_DEVICES:-any}" ;;
esac
"""
GOOD = "ok      NPU 3: Ascend910B2 (A2 or A3: dynamic W8A8, bfloat16), 60.0 of 64.0 GB free"


@pytest.fixture
def machine(tmp_path):
    """run(*flags, set_env, **environment) -> (exit code, stdout, lines of stderr)."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()

    def run(*flags, set_env=None, **environment):
        (toolkit / "set_env.sh").write_text(set_env or "export SOURCED=1\n")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "TASK_QUEUE"))}
        clean |= {"PYTHON": str(python), "HOME": str(tmp_path), "ASCEND_TOOLKIT_HOME": str(toolkit), "CHECK": GOOD}
        done = subprocess.run(
            ["bash", "scripts/run_ascend.sh", *flags],
            cwd=ROOT,
            env=clean | {"WORKS": "", "SOURCED": ""} | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    return run


def test_an_environment_that_returns_non_zero_or_reads_unset_variables_is_survived(machine):
    code, out, lines = machine(
        "--precision", "full", "hi", set_env='export SOURCED=1\n[ "$NOBODY_SET" ]\nfalse\nreturn 3\n'
    )
    assert code == 0, lines
    assert lines[0].startswith("ok      CANN environment: ")
    assert out.startswith("ran -m quasar_npu.generate --model tiny-openpangu --precision full hi")


def test_an_environment_that_works_is_not_sourced_again(machine):
    code, _, lines = machine("--check", WORKS="1", set_env="echo sourced >&2\n")
    assert code == 0
    assert lines[0] == "ok      CANN environment: already there"
    assert "sourced" not in lines


def test_a_machine_without_npu_smi_runs(machine):
    """In containers it is often not mounted; what counts is whether torch-npu sees an NPU."""
    code, out, lines = machine("--precision=full", "hi", WORKS="1")
    assert code == 0
    assert [line for line in lines if line.startswith("WARN    npu-smi")]
    assert "TASK_QUEUE_ENABLE=1 on 3" in out  # the NPU that the check named


def test_what_is_missing_ends_the_run_with_the_docker_line(machine):
    code, out, lines = machine("hi", WORKS="1", CHECK="MISSING no NPU is visible: see npu-smi info")
    assert (code, out) == (1, "")
    assert lines[-1].startswith("No /dev/davinci_manager here: in a container, start it with the docker line")
    recipe = (ROOT / "scripts/run_ascend.sh").read_text()
    assert all(word in recipe for word in ("docker run", "/dev/davinci0", "/dev/hisi_hdc", "/usr/local/dcmi"))


def test_verify_takes_the_model_and_a_file(machine):
    code, out, _ = machine("--verify", "--model", "/m", "--report", "r.txt", "--trust-remote-code", WORKS="1")
    assert code == 0
    assert out.startswith("ran -m quasar_npu.verify --model /m --trust-remote-code --report r.txt")


def test_ci_does_not_skip_ascend_tests_in_silence(tmp_path):
    """Without a compiler (or without torch-npu) they cannot run; a developer is told so, CI fails."""
    for tool in ("dirname", "uname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for ci, code in (("", 0), ("true", 1)):
        done = subprocess.run(
            ["/bin/bash", str(ROOT / "scripts/test_ascend.sh")],
            env={"PATH": str(tmp_path), "CI": ci, "CC": "no-such-compiler", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout == "Ascend tests skipped: no C compiler (install gcc)\n"
        assert done.returncode == code
