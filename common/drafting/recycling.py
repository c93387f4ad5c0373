"""The verifier's runners-up, proposed when the same tokens come again (Token Recycling, arXiv 2408.08696)."""

from __future__ import annotations

from collections.abc import Sequence


class Recycled:
    """What the verifier's logits last named behind each pair of tokens, and behind each token.

    The logits of every verified row, the rejected ones included, cost nothing more. The paper keeps one token of
    context; two tell more where they came before.
    """

    PAIRS = 200_000  # the oldest go

    def __init__(self) -> None:
        self.singles: dict[int, Sequence[int]] = {}
        self.pairs: dict[tuple[int, int], Sequence[int]] = {}

    def take(self, before: int, last: int, best: Sequence[int]) -> None:
        """best: the verifier's most probable tokens behind (before, last), best first."""
        self.singles[last] = best
        self.pairs[before, last] = best
        if len(self.pairs) > self.PAIRS:
            del self.pairs[next(iter(self.pairs))]
