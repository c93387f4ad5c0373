"""Where a pass on CPU goes: time in each C kernel, waiting for other threads included, and what Python takes."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from quasar.backends.base import Batch, Segment
from quasar.backends.cpu.backend import CpuBackend
from quasar.errors import QuasarError
from quasar.evaluation.speed import context_ids
from quasar.models.decoder import Decoder
from quasar.models.runtime import Runtime

_WARM_UP = 2


@dataclass(frozen=True)
class KernelTime:
    """Median milliseconds of all calls of one kernel in a pass, and their median share of it."""

    kernel: str
    milliseconds: float
    share: float


def profile_pass(decoder: Decoder, context: int, rows: int, repeats: int) -> list[KernelTime]:
    """One pass of `rows` new tokens behind `context`: its kernels in order of first call, then "outside" all of them,
    and "pass", the whole. Raises QuasarError off the CPU backend, which alone records passes."""
    if not isinstance(decoder.backend, CpuBackend):
        raise QuasarError(f"--profile: the {decoder.backend.name} backend records no passes; add --device cpu")
    runtime = Runtime(decoder)
    slot = runtime.new_slot(context + rows)
    runtime.prefill(slot, context_ids(decoder.config.vocab_size, context).tolist())
    try:
        batch = Batch([Segment(slot, list(range(rows)), logits_to_keep=rows)])
        recorded = decoder.backend.capture(decoder, batch)
    except NotImplementedError as error:
        raise QuasarError(f"--profile: a pass of this model cannot be recorded ({error})") from None
    samples: dict[str, list[float]] = defaultdict(list)
    for repeat in range(_WARM_UP + repeats):
        start = time.perf_counter()
        calls = recorded.timed_replay(batch)
        whole = time.perf_counter() - start
        if repeat < _WARM_UP:
            continue
        by_name: Counter[str] = Counter()
        for name, seconds in calls:
            by_name[name] += seconds
        for name, seconds in by_name.items():
            samples[name].append(seconds)
        samples["outside"].append(whole - sum(by_name.values()))
        samples["pass"].append(whole)
    return [
        KernelTime(
            name,
            1e3 * statistics.median(times),
            statistics.median(t / p for t, p in zip(times, samples["pass"], strict=True)),
        )
        for name, times in samples.items()
    ]
