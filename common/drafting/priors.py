"""What the sources' evidence weighs before anything was learnt.

Fitted to greedy answers of real models by scripts/experiments/fit_drafting.py, which also says how well the weights do
on files that they were not fitted to. Few numbers stand for many features: rank and count add up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from quasar.drafting.evidence import CORPUS_HOW, CORPUS_MATCH, COUNTS, FREQUENCY, HOW, RANKS, RECYCLED, SIZE

_HOWS = 5 * RANKS * COUNTS


def _layout() -> dict[str, int]:
    """Where each group of parameters begins."""
    sizes = {
        "match": HOW,
        "rank": 5 * RANKS,
        "count": 5 * COUNTS,
        "frequency": CORPUS_MATCH - FREQUENCY,
        "corpus match": CORPUS_HOW - CORPUS_MATCH,
        "corpus rank": 5 * RANKS,
        "corpus count": 5 * COUNTS,
        "recycled": SIZE - RECYCLED,
    }
    begins, at = {}, 0
    for name, size in sizes.items():
        begins[name] = at
        at += size
    return begins | {"end": at}


GROUPS = _layout()


def parameters_of(feature: int) -> tuple[int, ...]:
    """The parameters that add up to a feature's weight."""
    for begin, rank, count in ((HOW, "rank", "count"), (CORPUS_HOW, "corpus rank", "corpus count")):
        if begin <= feature < begin + _HOWS:
            match, how = divmod(feature - begin, RANKS * COUNTS)
            ranked, counted = divmod(how, COUNTS)
            return GROUPS[rank] + match * RANKS + ranked, GROUPS[count] + match * COUNTS + counted
    for begin, name in ((RECYCLED, "recycled"), (CORPUS_MATCH, "corpus match"), (FREQUENCY, "frequency"), (0, "match")):
        if feature >= begin:
            return (GROUPS[name] + feature - begin,)
    raise AssertionError(feature)


def weights_from(parameters: Sequence[float]) -> list[float]:
    """The weights of all features."""
    return [sum(parameters[p] for p in parameters_of(feature)) for feature in range(SIZE)]


@cache
def _fitted() -> dict[str, list[float]]:
    path = Path(__file__).with_name("priors.json")
    return {name: weights_from(parameters) for name, parameters in json.loads(path.read_text(encoding="utf-8")).items()}


def prior_weights(corpus: bool, recycled: bool) -> list[float]:
    """The weights for the text and these sources beside it."""
    return list(_fitted()[("warm" if corpus else "cold") + (" recycled" if recycled else "")])
