"""The benchmark's arithmetic; its clock is not tested."""

import functools
import operator

import pytest
import torch

from quasar.backends import get_backend
from quasar.backends.cpu import kernels
from quasar.evaluation import speed
from quasar.evaluation.speed import BandwidthProbe, Step, decoder_step, time_steps


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.spend(seconds)` moves, and a memory that yields 100 bytes per second."""

    class Clock:
        now = 0.0

        def spend(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(speed, "BandwidthProbe", lambda backend: lambda: 100.0)
    return clock


def test_ratios_are_medians_within_rounds_and_rewinding_is_free(clock):
    """A machine that slows down tenfold half-way changes the milliseconds, not the ratios."""
    passes = {"full": 0, "w8a8": 0}
    rewound = []

    def step(name: str, seconds: float) -> Step:
        def run(ids: torch.Tensor) -> torch.Tensor:
            passes[name] += 1
            clock.spend(seconds * (10 if passes[name] > 4 else 1))
            return ids

        def rewind(rows: int) -> None:
            rewound.append(rows)
            clock.spend(1000)

        return Step(run, rewind, weight_bytes=50)

    steps = {"full": step("full", 2.0), "w8a8": step("w8a8", 1.0)}
    full, w8a8 = time_steps(steps, [6], 5, 10, get_backend("cpu"))
    assert (full.vs_full, w8a8.vs_full) == (1.0, 2.0)
    assert (full.milliseconds, w8a8.milliseconds) == (20e3, 10e3)
    assert w8a8.floor_ms == 500.0  # 50 bytes at 100 a second
    assert w8a8.of_floor == 0.05  # three of the five rounds were slow
    assert w8a8.spread == pytest.approx(0.9)
    assert rewound == [6] * 14  # warm-up and rounds, both schemes


def test_without_full_precision_there_is_no_ratio_to_it(clock):
    step = Step(lambda ids: clock.spend(1.0), weight_bytes=100)
    (cost,) = time_steps({"w8a8": step}, [1], 1, 10, get_backend("cpu"))
    assert cost.vs_full is None
    assert cost.of_floor == 1.0


def test_a_step_leaves_no_trace(shipped):
    model = shipped("qwen3", "w8a8")
    decoder = model.decoder
    step = decoder_step(decoder, 20, 6)
    ids = torch.arange(40, 46)
    first = step.run(ids)
    step.run(torch.arange(3))
    assert torch.equal(step.run(ids), first)
    assert step.weight_bytes == decoder.weight_bytes_per_pass + 20 * model.runtime.kv_bytes_per_position


def test_bandwidth_takes_the_fastest_read(monkeypatch):
    monkeypatch.setattr(speed, "_READ_BYTES", 4096)
    probe = BandwidthProbe(get_backend("cpu"))
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0, 30.0, 34.0])  # reads of 4, 2, 8 and 4 seconds
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    probe._reads = [lambda: None] * 2
    assert probe() == 2048.0


@pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
def test_the_bare_read_reads_everything():
    values = torch.randint(-(2**31), 2**31 - 1, (16 * 37,), dtype=torch.int32)
    expected = functools.reduce(operator.xor, values.tolist())
    for name in kernels.instruction_sets():
        with kernels.use_instruction_set(name):
            assert kernels.read(values) == expected
    with pytest.raises(ValueError, match="lines of 16"):
        kernels.read(values[:20])
