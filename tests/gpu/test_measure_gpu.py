"""scripts/measure_gpu.py, as far as a machine without a card can run it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from quasar.models.config import DUMMY_SHAPES
from quasar.models.linear import W8A8Linear
from quasar_gpu import graphs
from quasar_gpu.backend import CudaBackend
from quasar_gpu.kernels import attention
from quasar_gpu.kernels.int4 import int4_configs
from quasar_gpu.kernels.linear import linear_configs
from scripts import measure_gpu
from scripts.gpu import kernels, operators
from scripts.gpu.models import SCHEMES, random_model
from tests.gpu.launches import record

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"

SHAPE = replace(
    DUMMY_SHAPES["qwen3-8b"],
    hidden_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=64,
    vocab_size=96,
)


@pytest.fixture
def errors(kernel_device, monkeypatch):
    monkeypatch.setattr(operators, "ROWS", 3)

    def measure() -> dict[str, operators.OperatorError]:
        found = operators.operator_errors(CudaBackend(kernel_device, torch.float32), SHAPE, context=5)
        return {result.operator: result for result in found}

    return measure


def test_operators_are_held_against_the_reference(errors):
    found = errors()
    assert len(found) == 18
    inexact = {name: result for name, result in found.items() if result.error >= 1e-5 or not result.invariant}
    # Its values may round to the neighbour where a sum's last place differs.
    assert set(inexact) <= {"attend, quantised, behind 5", "int8_linear gate_up with swiglu"}
    assert all(result.invariant and result.error < 0.02 for result in inexact.values())
    assert found["int8_linear down"].error == found["embed"].error == 0


def test_a_wrong_operator_and_one_that_depends_on_the_window_are_seen(errors, monkeypatch):
    right, swiglu = CudaBackend.result, CudaBackend.swiglu

    def wrong(self, x, quant):
        return swiglu(self, x, quant) if quant else swiglu(self, x, quant) * x.shape[0]

    monkeypatch.setattr(
        CudaBackend, "result", lambda self, y: y if isinstance(y, torch.Tensor) else right(self, y) * 1.1
    )
    monkeypatch.setattr(CudaBackend, "swiglu", wrong)
    found = errors()
    assert found["linear qkv"].error == pytest.approx(0.1, rel=1e-3)
    assert found["linear qkv"].invariant
    assert not found["swiglu"].invariant


def test_every_kernel_is_timed(kernel_device):
    """By a timer that runs it once and says that it took a microsecond."""
    bench = kernels.KernelBench(SHAPE, torch.bfloat16, kernel_device, measure_gpu.run_once)
    (int8,), (full,) = bench.int8_linear("down", [2]), bench.float_linear("lm_head", [2])
    assert (int8.nbytes, full.nbytes) == (32 * 64, 96 * 32 * 2)
    (wide,), (int4,) = bench.int8_linear("down", [2], digits=2), bench.int4_linear("down", [2], 32, True)
    assert (wide.kernel, wide.nbytes) == ("wide_int8_linear down", int8.nbytes)
    assert (int4.kernel, int4.nbytes) == ("int4_linear down, groups of 32 with zero points", 32 * (32 + 4 + 4))
    assert kernels.table_row(int8) == {"kernel": "int8_linear down", "M": 2, "us": 1.0, "GB/s": 2.0}
    names = [time.kernel for time in (*bench.row_kernels(2), *bench.attention_kernels(2, 20))]
    assert names[:4] == ["embed", "add_rms_norm_quantize", "quantize", "quantize_by_peak"]
    assert names[4:] == ["quantize_by_peak, two digits", "attend_items behind 20", "combine behind 20"]
    assert len(list(bench.sweep("o", 2))) == len(linear_configs()) + len(int4_configs(32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_to_time_are_what_they_say(kernel_device, monkeypatch, scheme):
    """And made without calibration's minutes."""
    monkeypatch.setitem(DUMMY_SHAPES, "small", replace(SHAPE, num_layers=1))
    monkeypatch.setattr(attention, "_UNROLLED", 1)
    model = random_model("small", scheme, CudaBackend(kernel_device, torch.bfloat16))
    (layer,), head = model.decoder.layers, model.decoder.lm_head
    assert (isinstance(head, W8A8Linear), model.precision) == ("lm_head" in scheme, scheme.partition(",")[0])
    if model.precision == "w8a8":
        wide = "inputs" not in scheme
        assert (layer.qkv.wide, layer.o.wide, layer.gate_up.wide, layer.down.wide) == (wide, False, False, wide)
    elif model.precision == "w4a16":
        assert (layer.down.packed.offset is None) == ("symmetric" in scheme)


def test_gaps_between_kernels_are_seen():
    """Also where a kernel starts while others run, as dependent launch has it."""
    events = [("norm", 10, 4), ("product", 16, 10), ("norm", 24, 6), ("product", 30, 5)]
    trace = {"traceEvents": [{"cat": "kernel", "name": n, "ts": t, "dur": d} for n, t, d in reversed(events)]}
    trace["traceEvents"] += [{"cat": "cpu_op", "name": "x", "ts": 0, "dur": 99}, {"name": "metadata"}]
    rows = {row["kernel"]: row for row in measure_gpu.gap_table(measure_gpu.kernels_of(trace, "kernel"))}
    assert rows["norm"] == {"kernel": "norm", "times": 2, "us": 5.0, "gap before, us": -1.0, "together, us": 8}
    assert rows["product"]["gap before, us"] == 1.0
    assert (rows["all"]["times"], rows["all"]["gap before, us"], rows["all"]["together, us"]) == (4, 2.0, 25.0)


def test_limits_add_up():
    for call in measure_gpu.CALLS.values():
        assert sum(seconds for _, seconds in call.values()) <= measure_gpu.SECONDS < 600
    assert list(measure_gpu.CALLS[1])[:3] == ["device", "correctness", "step w8a8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_card_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps", "device"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=os.environ | {"OUT": str(tmp_path)}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("measure_gpu: --device cuda: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rehearsed(kernel_device, tmp_path, monkeypatch):
    """Runs a step in this process as the rehearsal does; returns its exit status and its tables."""
    if kernel_device.type == "cuda":
        pytest.skip("the rehearsal is for machines without a card")
    monkeypatch.setitem(DUMMY_SHAPES, "rehearsal", replace(SHAPE, num_layers=1, max_position_embeddings=200))
    monkeypatch.setattr(graphs, "capture", record)
    monkeypatch.setattr(attention, "_UNROLLED", 1)
    monkeypatch.setattr(measure_gpu, "stand_in", lambda: None)

    def run(name: str) -> tuple[int, dict]:
        path = tmp_path / "figures.json"
        status = 0
        try:
            measure_gpu.run_step(name, path, rehearse=True)
        except SystemExit as end:
            status = end.code
        return status, json.loads(path.read_text()) if path.exists() else {}

    return run


@pytest.mark.parametrize(("step", "table"), [("device", "device"), ("profile", "kernels of one replay, M = 6")])
def test_a_step_is_rehearsed(rehearsed, step, table):
    """All steps: python scripts/measure_gpu.py --rehearse, in some minutes."""
    status, tables = rehearsed(step)
    assert status == 0
    assert tables[table]


@pytest.mark.parametrize("step", measure_gpu.ALL_STEPS)
def test_a_step_that_fails_says_so(rehearsed, monkeypatch, step):
    monkeypatch.setenv("QUASAR_MEASURE_FAIL", step)
    assert rehearsed(step) == (1, {})


def test_a_figure_that_fails_costs_no_other(rehearsed, monkeypatch):
    monkeypatch.setenv("QUASAR_MEASURE_FAIL", "bandwidth")
    status, tables = rehearsed("device")
    assert status == 3
    assert len(tables["device"]) == 7  # the figure itself was made before it was asked to fail
    assert tables["failures"] == [{"what": "bandwidth", "error": "RuntimeError: bandwidth was asked to fail"}]


def test_results_land_where_they_come_back_from(tmp_path, monkeypatch, capsys):
    """And a step that fails, whatever its status, or hangs, leaves the others to go on."""
    ends = {"step w8a8": 2, "decode": None, "profile": 0}
    codes = {"step w8a8": "raise SystemExit(2)", "decode": "import time; time.sleep(99)", "profile": "print('traced')"}

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            name = command[command.index("--alone") + 1]
            super().__init__([sys.executable, "-c", codes[name]], **options)

    monkeypatch.setattr(measure_gpu.subprocess, "Popen", Popen)
    for name in ends:
        monkeypatch.setitem(measure_gpu.ALL_STEPS, name, (None, 100 if codes[name] != codes["decode"] else 6))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--steps", "profile,step w8a8,decode"])
    measure_gpu.main()
    figures = json.loads((tmp_path / "out" / "gpu1.json").read_text())
    outcomes = {name: step["outcome"] for name, step in figures.items()}
    assert outcomes == {"profile": "done", "step w8a8": "failed with status 2", "decode": "ran out of time"}
    assert "traced" in (tmp_path / "out" / "gpu1.log").read_text()
    assert "step w8a8: failed with status 2" in capsys.readouterr().out
