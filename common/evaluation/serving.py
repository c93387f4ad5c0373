"""Many sequences at once, in process: tokens per second and waiting times by the number of sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from quasar.engine.engine import Engine
from quasar.engine.settings import GenerationSettings, TokenEvent
from quasar.models.model import Model

# name, precision, draft
SCHEMES = (
    ("plain, full precision", "full", "none"),
    ("drafts, full precision", "full", None),
    ("plain, W8A8", "w8a8", "none"),
    ("Quasar", "w8a8", None),
)


@dataclass(frozen=True)
class Served:
    """One scheme at one number of sequences; seconds are medians over the sequences."""

    scheme: str
    sequences: int
    tokens_per_second: float  # of all sequences together, prompts included in the time
    first_token: float  # seconds
    between_tokens: float  # seconds
    acceptance_length: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class _Clock:
    """When a sequence's tokens came."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.times: list[float] = []

    def take(self, events: list[TokenEvent] | None) -> None:
        self.times += [time.perf_counter()] * sum(event.token_id is not None for event in events or [])


def serve(model: Model, prompts: Sequence[Sequence[int]], settings: GenerationSettings, scheme: str) -> Served:
    """Submits all prompts at once to an engine of as many slots, and waits for all of them."""
    with Engine(model, max_sequences=len(prompts)) as engine:
        begin = time.perf_counter()
        clocks = [_Clock() for _ in prompts]
        handles = [
            engine.submit(prompt, settings, on_events=clock.take) for prompt, clock in zip(prompts, clocks, strict=True)
        ]
        results = [handle.result() for handle in handles]
        seconds = time.perf_counter() - begin
    tokens = sum(result.stats.tokens for result in results)
    gaps = [(c.times[-1] - c.times[0]) / (len(c.times) - 1) for c in clocks if len(c.times) > 1]
    passes = sum(result.stats.passes for result in results)
    return Served(
        scheme,
        len(prompts),
        tokens / seconds,
        statistics.median(c.times[0] - c.submitted for c in clocks),
        statistics.median(gaps) if gaps else 0.0,
        (tokens - len(results)) / passes if passes else 1.0,
    )


def compare(
    models: dict[str, Model],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    settings: Callable[[str | None], GenerationSettings],
    repeats: int,
    tick: Callable[[], object] = lambda: None,
) -> list[Served]:
    """Every scheme at every number of sequences, `repeats` rounds in turn after one warm-up; medians.

    settings: from a draft's name, None for the default, to what to generate. Each round takes other prompts, so that
    no prompt is found in a cache.
    """
    rounds: dict[tuple[str, int], list[Served]] = {}
    for round_ in range(repeats + 1):
        for name, precision, draft in SCHEMES:
            for count in counts:
                first = round_ * max(counts)
                chosen = [prompts[(first + i) % len(prompts)] for i in range(count)]
                served = serve(models[precision], chosen, settings(draft), name)
                if round_:
                    rounds.setdefault((name, count), []).append(served)
                tick()
    return [_median(served) for served in rounds.values()]


def _median(rounds: Sequence[Served]) -> Served:
    def of(field: str) -> float:
        return statistics.median(getattr(served, field) for served in rounds)

    return Served(
        rounds[0].scheme,
        rounds[0].sequences,
        of("tokens_per_second"),
        of("first_token"),
        of("between_tokens"),
        of("acceptance_length"),
    )
