"""What a forward pass costs, against the floor that memory sets: every weight read once.

Everything is timed in one run, schemes in turn, since machines drift: only ratios within a run mean something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.backends.base import Backend
from common.models.decoder import Decoder

_BANDWIDTH_BYTES = 1 << 30
_WARM_UP = 2


@dataclass(frozen=True)
class StepCost:
    """A pass of `rows` new tokens. `floor_ms` is weight bytes / measured bandwidth (0 for peers, whose bytes are
    their own affair)."""

    scheme: str
    rows: int
    milliseconds: float  # median
    spread: float  # (largest - smallest) / median
    weight_bytes: int
    floor_ms: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.weight_bytes / self.milliseconds / 1e6

    @property
    def percent_of_floor(self) -> float:
        """100 is the memory limit; 50 took twice as long."""
        return 100 * self.floor_ms / self.milliseconds


Step = Callable[[torch.Tensor], object]  # runs one pass over ids [rows] behind the context, leaving no trace


def read_bandwidth(backend: Backend) -> float:
    """Bytes per second that this device reads from memory.

    CPU: a float32 sum of 1 GiB. Elsewhere: a device-to-device copy of 1 GiB, bytes read plus bytes written. The best
    of several, since this is a limit.
    """
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=backend.device)
    on_cpu = backend.device.type == "cpu"
    target = None if on_cpu else torch.empty_like(data)
    best = float("inf")
    for _ in range(7):
        backend.synchronize()
        start = time.perf_counter()
        if target is None:
            data.sum()
        else:
            target.copy_(data)
        backend.synchronize()
        best = min(best, time.perf_counter() - start)
    return _BANDWIDTH_BYTES * (1 if on_cpu else 2) / best


def decoder_step(decoder: Decoder, context: int, most_rows: int) -> Step:
    """Passes of a decoder behind `context` committed tokens."""
    decoder.pack()
    cache = decoder.new_cache(context + most_rows)
    decoder.prefill(torch.arange(context) % decoder.config.vocab_size, cache, keep=1)

    def step(ids: torch.Tensor) -> object:
        return decoder(ids, cache, keep=len(ids))  # never committed: the next pass overwrites it

    return step


def time_steps(
    steps: dict[str, tuple[Step, int]],
    rows: Sequence[int],
    repeats: int,
    vocab: int,
    backend: Backend,
    tick: Callable[[], object] = lambda: None,
) -> list[StepCost]:
    """Times each scheme's step, given with its weight bytes per pass, for each number of rows: `repeats` rounds over
    all of them in turn, bandwidth measured before and after. `tick` is called after each round."""
    bandwidth = read_bandwidth(backend)
    seconds: dict[tuple[str, int], list[float]] = {(name, m): [] for m in rows for name in steps}
    windows = {
        m: torch.randint(0, vocab, (m,), generator=torch.Generator().manual_seed(m)).to(backend.device) for m in rows
    }
    for round_ in range(_WARM_UP + repeats):
        for m in rows:
            for name, (step, _) in steps.items():
                backend.synchronize()
                start = time.perf_counter()
                step(windows[m])
                backend.synchronize()
                if round_ >= _WARM_UP:
                    seconds[name, m].append(time.perf_counter() - start)
        tick()
    bandwidth = max(bandwidth, read_bandwidth(backend))
    costs = []
    for (name, m), samples in seconds.items():
        median = statistics.median(samples)
        weight_bytes = steps[name][1]
        costs.append(
            StepCost(
                name,
                m,
                1e3 * median,
                (max(samples) - min(samples)) / median,
                weight_bytes,
                1e3 * weight_bytes / bandwidth,
            )
        )
    return costs
