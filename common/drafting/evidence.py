"""How probable a candidate is: the evidence of all sources added up as log-odds, and learnt while running.

P(right, given that its ancestors are) = sigmoid(sum of the weights of its features). A feature says how a source came
by the candidate, or that the source knows the place and does not name it: a candidate that several sources name gets
the weight of each. That is logistic mixing of context models (Mahoney 2005), with one weight for each case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

ORDER = 6  # the longest match that is told from longer ones
RANKS, COUNTS, FREQUENCIES = 6, 5, 10
RUNNERS_UP = 8  # of the verifier's most probable tokens that are recycled
SHARE_BOUNDS = (0.01, 0.03, 0.08, 0.2, 0.4, 0.6, 0.8, 0.95)  # of a token; below the first it is left out
SOURCES = ("text", "corpus", "recycled", "logits")


def _buckets(bounds: tuple[int, ...], size: int) -> list[int]:
    return [sum(n >= bound for bound in bounds) for n in range(size)]


COUNT_BUCKET = _buckets((2, 3, 5, 9), 16)  # of a continuation's occurrences
FREQUENCY_BUCKET = _buckets((1, 2, 3, 5, 8, 12, 20, 35, 60), 64)  # of a token's occurrences in the text

# Where each group of features begins in the list of weights.
MATCH = 0  # [longest match in the text][match that names the token]; 0: only its frequency does
HOW = MATCH + (ORDER + 1) ** 2  # [match, 4 and longer as 4][rank by latest occurrence][count]
FREQUENCY = HOW + 5 * RANKS * COUNTS  # [match, 2 and longer as 2][occurrences of the token]
CORPUS_MATCH = FREQUENCY + 3 * FREQUENCIES  # as MATCH; [longest][0]: not named
CORPUS_HOW = CORPUS_MATCH + (ORDER + 1) ** 2
SHARES = 1 + len(SHARE_BOUNDS)  # not named, then by share
RECYCLED = CORPUS_HOW + 5 * RANKS * COUNTS  # [tokens in front that the row shares, 0: no such row][share]
RECYCLED_ORDER = 3  # the most of them
LAST = RECYCLED + (RECYCLED_ORDER + 1) * SHARES  # [share] in the pass's last row, whose place the last token took
SIZE = LAST + SHARES


class Key(NamedTuple):
    """What survival is learnt for."""

    source: str  # of SOURCES, the one whose evidence is strongest
    match: int  # tokens of the match in the text
    depth: int
    features: tuple[int, ...]


class Evidence:
    """The weights, for one set of sources. One object may serve all sequences of an engine."""

    RATE = 0.02  # of learning
    _REFRESH = 64  # passes after which the bounds are computed anew

    def __init__(self, weights: Iterable[float]) -> None:
        self.weights = list(weights)
        # What the text's evidence adds up to at most, by the feature of MATCH: for candidates of so long a match or of
        # a shorter one; and by match, from the frequency alone.
        self.bound: list[float] = []
        self.frequency_bound: list[float] = []
        self._passes = 0
        self._find_bounds()

    def learn(self, outcomes: Iterable[tuple[Sequence[int], float, bool]]) -> None:
        """Takes features, the probability they gave, and whether it came true, of each candidate that was tested."""
        weights, rate = self.weights, self.RATE
        for features, probability, right in outcomes:
            step = rate * (right - probability)
            for feature in features:
                weights[feature] += step
        self._passes += 1
        if self._passes % self._REFRESH == 0:
            self._find_bounds()

    def _find_bounds(self) -> None:
        weights, self.bound, self.frequency_bound, others = self.weights, [], [], []
        for order in range(ORDER + 1):
            how = HOW + min(order, 4) * RANKS * COUNTS
            frequency = FREQUENCY + min(order, 2) * FREQUENCIES
            self.frequency_bound.append(max(weights[frequency : frequency + FREQUENCIES]))
            others.append(max(weights[how : how + RANKS * COUNTS]) + self.frequency_bound[order])
        for longest in range(ORDER + 1):
            most = float("-inf")
            for order in range(ORDER + 1):
                most = max(most, weights[MATCH + longest * (ORDER + 1) + order] + others[order])
                self.bound.append(most)
