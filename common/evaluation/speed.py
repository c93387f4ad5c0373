"""What a forward pass costs, against the floor that memory sets: every weight read once.

Schemes take turns, and the bandwidth is measured between them: a machine's own changes within minutes (on shared
hosts by a factor), so that only ratios of neighbours mean something. What is reported is the median of those.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quasar.backends.base import Backend, Batch, Segment
from quasar.backends.cpu import kernels
from quasar.backends.cpu.slot import CpuSlot
from quasar.models.decoder import Decoder
from quasar.models.runtime import PROMPT_ROWS, Runtime

_READ_BYTES = 512 << 20  # larger than the outer caches
_READS = 2  # each time; the faster counts
_WARM_UP = 2


@dataclass(frozen=True)
class Step:
    """Passes of one engine behind a context: `run` takes ids [rows] and returns logits [rows_kept(rows), vocab];
    `rewind(rows)` then puts the context back as it was, which is not timed.

    weight_bytes is what a pass reads of weights, keys and values (0 for peers, whose bytes are their own affair).
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    rewind: Callable[[int], object] = lambda rows: None
    weight_bytes: int = 0


@dataclass(frozen=True)
class StepCost:
    """A pass of `rows` new tokens: medians over the rounds, ratios taken within each round."""

    scheme: str
    rows: int
    milliseconds: float
    spread: float  # (largest - smallest) / median
    weight_bytes: int
    bandwidth: float  # bytes per second, measured beside the pass
    of_floor: float  # time that reading weight_bytes takes / time of the pass: 1 is the memory limit, 0.5 twice as long
    vs_full: float | None  # time of full precision / time of this scheme; None where full precision was not run

    @property
    def floor_ms(self) -> float:
        return 1e3 * self.weight_bytes / self.bandwidth

    @property
    def gigabytes_per_second(self) -> float:
        return self.weight_bytes / self.milliseconds / 1e6


_PREFILLED = 512  # tokens of a longer context on CPU: its other keys and values are copies of theirs


class BandwidthProbe:
    """How fast this device reads memory at the moment.

    CPU: a float32 sum and, where the kernels are built, their bare read, of 512 MiB. Elsewhere: a device-to-device
    copy, bytes read plus bytes written.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        data = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=backend.device)
        self._bytes = data.nbytes
        self._reads: list[Callable[[], object]] = [data.sum]
        if backend.device.type != "cpu":
            target = torch.empty_like(data)
            self._bytes *= 2
            self._reads = [lambda: target.copy_(data)]
        elif kernels.available():
            self._reads.append(lambda: kernels.read(data.view(torch.int32)))

    def __call__(self) -> float:
        """Bytes per second: the best of a few reads, since this is a limit."""
        best = float("inf")
        for read in self._reads * _READS:
            self._backend.synchronize()
            start = time.perf_counter()
            read()
            self._backend.synchronize()
            best = min(best, time.perf_counter() - start)
        return self._bytes / best


def rows_kept(rows: int) -> int:
    """Of how many of the last rows every engine computes logits: a window's all; more are a prompt, which goes by
    PROMPT_ROWS here, and needs its last."""
    return rows if rows <= PROMPT_ROWS else 1


def decoder_step(decoder: Decoder, context: int, most_rows: int) -> Step:
    """Passes of a decoder behind `context` committed tokens."""
    runtime = Runtime(decoder)
    slot = runtime.new_slot(context + most_rows)
    copies = isinstance(slot, CpuSlot)  # what keys and values are takes no time, and a long prompt minutes
    computed = min(context, _PREFILLED) if copies else context
    runtime.prefill(slot, context_ids(decoder.config.vocab_size, computed).tolist())
    if copies:
        slot.repeat(context)

    def run(ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > PROMPT_ROWS:
            return runtime.prefill(slot, ids.tolist())
        # Never committed: the next pass overwrites it.
        return runtime.run(Batch([Segment(slot, ids.tolist(), logits_to_keep=len(ids))]))

    weight_bytes = decoder.weight_bytes_per_pass + context * runtime.kv_bytes_per_position
    return Step(run, lambda rows: slot.rewind(context), weight_bytes)


def context_ids(vocab: int, tokens: int) -> torch.Tensor:
    """The context that every engine gets."""
    return torch.arange(tokens) % vocab


def time_steps(
    steps: dict[str, Step],
    rows: Sequence[int],
    repeats: int,
    vocab: int,
    backend: Backend,
    tick: Callable[[], object] = lambda: None,
) -> list[StepCost]:
    """Times each scheme's step for each number of rows: `repeats` rounds over all of them in turn, the bandwidth
    measured in each. `tick` is called after each round."""
    probe = BandwidthProbe(backend)
    seconds: dict[tuple[str, int], list[float]] = {(name, m): [] for m in rows for name in steps}
    bandwidths: dict[int, list[float]] = {m: [] for m in rows}
    windows = {m: torch.randint(0, vocab, (m,), generator=torch.Generator().manual_seed(m)) for m in rows}
    for round_ in range(_WARM_UP + repeats):
        for m in rows:
            bandwidth = probe()
            for name, step in steps.items():
                backend.synchronize()
                start = time.perf_counter()
                step.run(windows[m])
                backend.synchronize()
                spent = time.perf_counter() - start
                step.rewind(m)
                if round_ >= _WARM_UP:
                    seconds[name, m].append(spent)
            if round_ >= _WARM_UP:
                bandwidths[m].append(max(bandwidth, probe()))
        tick()
    return [
        _cost(name, m, steps[name].weight_bytes, samples, bandwidths[m], seconds.get(("full", m)))
        for (name, m), samples in seconds.items()
    ]


def _cost(
    name: str, rows: int, weight_bytes: int, samples: list[float], bandwidths: list[float], full: list[float] | None
) -> StepCost:
    median = statistics.median(samples)
    of_floor = statistics.median(weight_bytes / b / s for b, s in zip(bandwidths, samples, strict=True))
    vs_full = None if full is None else statistics.median(f / s for f, s in zip(full, samples, strict=True))
    spread = (max(samples) - min(samples)) / median
    return StepCost(name, rows, 1e3 * median, spread, weight_bytes, statistics.median(bandwidths), of_floor, vs_full)
