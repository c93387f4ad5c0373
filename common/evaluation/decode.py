"""End to end: tokens per second of the four schemes, over prompts, or at a stated acceptance length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from quasar.generation import GenerationSettings, generate
from quasar.models.model import Model
from quasar.speculation.acceptance import Acceptance
from quasar.speculation.draft import Draft
from quasar.speculation.verifier import Verifier
from quasar.speculation.window import MAX_GAMMA
from torch import Tensor

# name, precision, draft: the paper's comparison
SCHEMES = (
    ("plain, full precision", "full", "none"),
    ("n-gram, full precision", "full", "ngram"),
    ("plain, W8A8", "w8a8", "none"),
    ("Quasar (n-gram, W8A8)", "w8a8", "ngram"),
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


class ReplayedAcceptance(Acceptance):
    """Accepts as many drafted tokens as make up a stated acceptance length on average; for random weights, whose own
    opinion of a draft means nothing. It does the greedy rule's work all the same, so that its cost is counted."""

    def __init__(self, acceptance_length: float, argmax: Callable[[Tensor], Tensor]) -> None:
        self._extra, self._due, self._argmax = acceptance_length - 1, 0.0, argmax

    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        own = self._argmax(logits).tolist()
        self._due += self._extra if draft.tokens else 0.0
        accepted = min(int(self._due), len(draft.tokens))
        self._due -= accepted
        return own[: accepted + 1]


def replayed(models: dict[str, Model], acceptance_length: float, context: int, tokens: int) -> list[Run]:
    """A run per scheme that commits `tokens` behind `context` random ones; drafting schemes draft MAX_GAMMA a time."""

    def run(precision: str, draft: str) -> Run:
        def measure() -> tuple[float, int, int]:
            decoder = models[precision].decoder
            cache = decoder.new_cache(context + tokens + MAX_GAMMA + 1)
            verifier = Verifier(decoder, cache, ReplayedAcceptance(acceptance_length, decoder.backend.argmax))
            ids = torch.randint(0, decoder.config.vocab_size, (context,)).tolist()
            last, done = verifier.start(ids), 0
            start = time.perf_counter()
            while done < tokens:
                drafted = ids[:MAX_GAMMA] if draft != "none" else []
                committed = verifier.step([last], Draft(drafted), done + 1)
                last, done = committed[-1], done + len(committed)
            decoder.backend.synchronize()
            return time.perf_counter() - start, done, verifier.passes

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
