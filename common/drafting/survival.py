"""How probable a candidate is, learnt while running from what verification kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

DEEPEST = 7  # deeper candidates are counted as this deep


class SurvivalTable:
    """Per key: the probability that a candidate is right, given that its ancestors are.

    It begins at a prior, which weighs as much as PRIOR_WEIGHT outcomes; from then on it is the average of the
    outcomes, and follows the latest MEMORY of them where a text changes.
    """

    PRIOR_WEIGHT, MEMORY = 8, 96

    def __init__(self, prior: Callable[..., float]) -> None:
        """prior: from a key's parts to the probability to begin with."""
        self._prior = prior
        self._known: dict[Hashable, list[float]] = {}  # key -> [probability, weight]

    def probability(self, key: tuple) -> float:
        """Of being right, given the ancestors."""
        known = self._known.get(key)
        return self._entry(key)[0] if known is None else known[0]

    def learn(self, outcomes: Iterable[tuple[Hashable, bool]]) -> None:
        """Takes outcomes as `Draft.outcomes` yields them."""
        for key, right in outcomes:
            entry = self._known.get(key) or self._entry(key)
            entry[1] += 1
            entry[0] += (right - entry[0]) / entry[1]
            if entry[1] > self.MEMORY:
                entry[1] = self.MEMORY

    def _entry(self, key: tuple) -> list[float]:
        return self._known.setdefault(key, [self._prior(*key), self.PRIOR_WEIGHT])

    def chain(self, source: str, match: int, length: int) -> tuple[list[float], list[Hashable]]:
        """Survival and keys of a chain of `length` candidates that a match of so many tokens brought."""
        survival, keys, path = [], [], 1.0
        for depth in range(length):
            key = (source, match, min(depth, DEEPEST))
            path *= self.probability(key)
            survival.append(path)
            keys.append(key)
        return survival, keys
