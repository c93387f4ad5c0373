"""scripts/measure_gpu.py, as far as a machine without a card can run it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from quasar.models.config import DUMMY_SHAPES
from quasar_gpu.backend import CudaBackend
from quasar_gpu.kernels.linear import linear_configs
from scripts import measure_gpu
from scripts.gpu import kernels, operators

SHAPE = replace(
    DUMMY_SHAPES["qwen3-8b"],
    hidden_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    vocab_size=96,
)


@pytest.fixture
def errors(kernel_device, monkeypatch):
    monkeypatch.setattr(operators, "MAX_WINDOW", 3)

    def measure() -> dict[str, operators.OperatorError]:
        found = operators.operator_errors(CudaBackend(kernel_device, torch.float32), SHAPE, context=5)
        return {result.operator: result for result in found}

    return measure


def test_operators_are_held_against_the_reference(errors):
    found = errors()
    assert len(found) == 17
    assert all(result.error < 1e-5 and result.invariant for result in found.values())
    assert found["int8_linear down"].error == found["embed"].error == 0


def test_a_wrong_operator_and_one_that_depends_on_the_window_are_seen(errors, monkeypatch):
    right, swiglu = CudaBackend.linear, CudaBackend.swiglu

    def wrong(self, x, quant):
        return swiglu(self, x, quant) if quant else swiglu(self, x, quant) * x.shape[0]

    monkeypatch.setattr(CudaBackend, "linear", lambda self, x, w, b: right(self, x, w, b) * 1.1)
    monkeypatch.setattr(CudaBackend, "swiglu", wrong)
    found = errors()
    assert found["linear qkv"].error == pytest.approx(0.1, rel=1e-3)
    assert found["linear qkv"].invariant
    assert not found["swiglu"].invariant


def test_every_kernel_is_timed(kernel_device):
    """By a timer that runs it once and says that it took a microsecond."""

    def timer(run, launches):
        run(launches - 1)
        return 1e-6

    bench = kernels.KernelBench(SHAPE, torch.bfloat16, kernel_device, timer)
    (int8,), (full,) = bench.int8_linear("down", [2]), bench.float_linear("lm_head", [2])
    assert (int8.nbytes, full.nbytes) == (32 * 48, 96 * 32 * 2)
    assert kernels.table_row(int8) == {"kernel": "int8_linear down", "M": 2, "us": 1.0, "GB/s": 1.5}
    names = [time.kernel for time in (*bench.row_kernels(2), *bench.attention_kernels(2, 20))]
    assert names[:4] == ["embed", "add_rms_norm_quantize", "quantize", "swiglu_quantize"]
    assert names[4:] == ["append_rotated", "window_attention behind 20"]
    cuts = {cut for cut, _ in bench.sweep("o", 2)}
    assert len(cuts) == len(linear_configs())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_card_is_one_line_and_leaves_nothing(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(script), "--steps", "device", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("measure_gpu: --device cuda: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        measure_gpu, "run_alone", lambda name, part, seconds: measure_gpu.outcome_of(int(name == "step"))
    )
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--steps", "step,decode", "--json", str(figures)])
    measure_gpu.main()
    outcomes = {name: step["outcome"] for name, step in json.loads(figures.read_text()).items()}
    assert outcomes == {"step": "failed with status 1", "decode": "done"}
    assert "step: failed with status 1" in capsys.readouterr().out
