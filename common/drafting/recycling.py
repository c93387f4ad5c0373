"""The verifier's runners-up, proposed when the same tokens come again (Token Recycling, arXiv 2408.08696)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from quasar.drafting.evidence import RECYCLED_ORDER, SHARE_BOUNDS

Row = Mapping[int, int]  # token -> bucket of its share


def row_of(best: Iterable[tuple[int, float]]) -> Row:
    """best: the most probable tokens of a row of logits, each with its share of their probability."""
    return {token: bisect_right(SHARE_BOUNDS, share) for token, share in best if share >= SHARE_BOUNDS[0]}


class Recycled:
    """What the verifier's logits last named behind the last one, two and three tokens.

    The logits of every verified row, the rejected ones included, cost nothing more. The paper keeps one token of
    context and the order of the runners-up; more context and their shares tell more.
    """

    MOST = 50_000  # contexts of each length; the oldest go. Some 700 bytes each

    def __init__(self) -> None:
        self._rows: list[dict[tuple[int, ...], Row]] = [{} for _ in range(RECYCLED_ORDER)]

    def take(self, text: Sequence[int], row: Row) -> None:
        """row: of the verifier behind a text, of which the last RECYCLED_ORDER tokens suffice."""
        for order, rows in enumerate(self._rows, 1):
            if len(text) >= order:
                rows[tuple(text[-order:])] = row
                if len(rows) > self.MOST:
                    del rows[next(iter(rows))]

    def behind(self, text: Sequence[int]) -> tuple[int, Row]:
        """Of the longest context that was seen: its tokens, and the row; (0, {}) where none was."""
        for order in range(min(len(text), RECYCLED_ORDER), 0, -1):
            row = self._rows[order - 1].get(tuple(text[-order:]))
            if row is not None:
                return order, row
        return 0, {}
