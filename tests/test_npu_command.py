"""The Ascend command where there is no NPU. What happens where there is one, tests/ascend tests."""

import importlib.util

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
