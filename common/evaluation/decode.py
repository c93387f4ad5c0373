"""End to end: tokens per second of the schemes, over prompts, or at a stated acceptance length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from quasar.backends.base import Batch, Segment
from quasar.drafting import DEFAULT_DRAFT
from quasar.generation import GenerationSettings, generate
from quasar.models.model import Model
from quasar.speculation.rows import PUBLISHED_GAMMA

# name, precision, draft
SCHEMES = (
    ("plain, full precision", "full", "none"),
    ("n-gram, full precision", "full", "ngram"),
    ("plain, W8A8", "w8a8", "none"),
    ("n-gram, W8A8", "w8a8", "ngram"),  # the paper's Quasar
    ("Quasar (hybrid, W8A8)", "w8a8", DEFAULT_DRAFT),
)


@dataclass(frozen=True)
class DecodeSpeed:
    """One scheme over all prompts: medians over the repeats, decoding only (the prompt's pass is the same for all)."""

    scheme: str
    tokens_per_second: float
    spread: float  # (largest - smallest) / median over the repeats
    acceptance_length: float
    speed: float  # over plain full precision, median of the ratios within each repeat
    replayed: bool  # the acceptance length was stated, not measured

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


Run = Callable[[], tuple[float, int, int]]  # one scheme over the work: decoding seconds, tokens after the first, passes


def over_prompts(models: dict[str, Model], prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Run]:
    """A run per scheme that really generates from every prompt."""

    def run(precision: str, draft: str) -> Run:
        def measure() -> tuple[float, int, int]:
            results = [generate(models[precision], ids, replace(settings, draft=draft)).result() for ids in prompts]
            stats = [result.stats for result in results]
            return (
                sum(s.seconds_decode for s in stats),
                sum(s.tokens - 1 for s in stats),
                sum(s.passes for s in stats),
            )

        return measure

    return [run(precision, draft) for _, precision, draft in SCHEMES]


def replayed(models: dict[str, Model], acceptance_length: float, context: int, tokens: int) -> list[Run]:
    """A run per scheme that commits `tokens` behind `context` random ones; with PUBLISHED_GAMMA drafted a pass.

    As many candidates are accepted as make up the stated acceptance length on average: for random weights, whose own
    opinion of a draft means nothing. The work of the greedy rule is done all the same, so that its cost is counted.
    """

    def run(precision: str, draft: str) -> Run:
        def measure() -> tuple[float, int, int]:
            runtime = models[precision].runtime
            slot = runtime.new_slot(context + tokens + PUBLISHED_GAMMA + 1)
            ids = torch.randint(0, runtime.config.vocab_size, (context,)).tolist()
            last = int(runtime.backend.argmax(runtime.prefill(slot, ids))[0])
            drafted = ids[:PUBLISHED_GAMMA] if draft != "none" else []
            done, passes, due = 0, 0, 0.0
            start = time.perf_counter()
            while done < tokens:
                window = Segment(slot, [last, *drafted], logits_to_keep=len(drafted) + 1)
                own = runtime.backend.argmax(runtime.run(Batch([window]))).tolist()
                due += acceptance_length - 1 if drafted else 0.0
                accepted = min(int(due), len(drafted))
                due -= accepted
                slot.commit(accepted + 1)
                last, done, passes = own[accepted], done + accepted + 1, passes + 1
            runtime.backend.synchronize()
            return time.perf_counter() - start, done, passes

        return measure

    return [run(precision, draft) for _, precision, draft in SCHEMES]


def compare_runs(
    runs: Sequence[Run], repeats: int, stated: bool, tick: Callable[[], object] = lambda: None
) -> list[DecodeSpeed]:
    """Runs the schemes in turn, `repeats` times after one warm-up."""
    rounds = []
    for round_ in range(repeats + 1):
        measured = [run() for run in runs]
        if round_:
            rounds.append(measured)
        tick()
    speeds = []
    for i, (name, _, _) in enumerate(SCHEMES):
        rates = [r[i][1] / r[i][0] for r in rounds]
        ratios = [(r[i][1] / r[i][0]) / (r[0][1] / r[0][0]) for r in rounds]
        median = statistics.median(rates)
        length = sum(r[i][1] for r in rounds) / sum(r[i][2] for r in rounds)
        speeds.append(
            DecodeSpeed(name, median, (max(rates) - min(rates)) / median, length, statistics.median(ratios), stated)
        )
    return speeds
