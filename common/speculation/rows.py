"""The one rule for rows: which candidates a pass verifies.

Every running sequence gets its next token. Further rows go to the candidates most likely to survive, over all sequences
together, as long as that brings more tokens per second than the rows cost. Where nothing pays, decoding is plain.
On a device that captures passes by their rows, candidates fill a pass up to one of a few sizes: each size has a first
pass, which takes several times as long as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import merge

from quasar.speculation.draft import Draft

PUBLISHED_GAMMA = 5  # candidates a pass in the papers' experiments
MOST_ROWS = 64  # of drafts and next tokens in one pass
CAPTURED_SIZES = (2, 4, *range(8, MOST_ROWS + 1, 8))  # of passes with drafts, where they are captured by their rows


class RowRule:
    """Chooses what brings most tokens per second. Engines take others for experiments."""

    def __init__(self, captured: bool = False) -> None:
        """captured: whether the device captures a pass for each number of rows."""
        self._sizes = frozenset(CAPTURED_SIZES if captured else range(MOST_ROWS + 1))

    def filled(self, rows: int) -> int:
        """The largest size of a pass up to so many rows; the rows themselves where there is none."""
        return max((size for size in self._sizes if size <= rows), default=rows)

    def least(self, sequences: int, rows: int, seconds: Callable[[int], float]) -> float:
        """Survival below which no candidate pays: that of a row where rows are cheapest.

        rows: of the pass without drafts, which brings so many sequences a token each.
        """
        sizes = [rows, *(size for size in CAPTURED_SIZES if size > rows)]
        costs = [seconds(size) for size in sizes]
        slopes = [(costs[i + 1] - costs[i]) / (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1)]
        return sequences / costs[0] * min(slopes, default=0.0)

    def candidates(
        self, drafts: Sequence[Draft], rows: int, seconds: Callable[[int], float], most: int = MOST_ROWS
    ) -> list[int]:
        """How many of each draft's candidates, which come most probable first, the pass should verify.

        rows: of the pass without drafts; seconds: of a pass over so many rows; most: rows in all.
        """
        best_rate, best, counts = len(drafts) / seconds(rows), 0, [0] * len(drafts)
        ranked = list(merge(*([(-s, i) for s in draft.survival] for i, draft in enumerate(drafts))))
        tokens = float(len(drafts))
        for taken, (negative, _) in enumerate(ranked[: max(0, most - rows)], 1):
            tokens -= negative
            if rows + taken not in self._sizes:
                continue
            rate = tokens / seconds(rows + taken)
            if rate > best_rate:
                best_rate, best = rate, taken
        for _, i in ranked[:best]:
            counts[i] += 1
        return counts

    def chain(
        self,
        survival: Sequence[float],
        seconds: Callable[[int], float],
        seconds_per_candidate: float,
        others: int = 0,
        free: Draft | None = None,
    ) -> int:
        """How long a chain to draft where each candidate takes a pass of the drafter.

        survival [longest]: of its candidates; seconds: of a verification over so many rows; others: sequences in its
        pass, which wait for the draft too; free: what could be verified instead, without passes of the drafter.
        """
        free = Draft() if free is None else free
        taken = self.candidates([free, *[Draft()] * others], 1 + others, seconds)[0]
        tokens = 1.0 + others
        best_rate, best = (tokens + sum(free.survival[:taken])) / seconds(1 + others + taken), 0
        for length, chance in enumerate(survival, 1):
            tokens += chance
            rate = tokens / (seconds(1 + others + length) + length * seconds_per_candidate)
            if rate > best_rate:
                best_rate, best = rate, length
        return best


class FixedRows(RowRule):
    """The same number of candidates in every pass, whatever they cost: the papers' fixed window."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def least(self, sequences: int, rows: int, seconds: Callable[[int], float]) -> float:
        return 0.0

    def candidates(
        self, drafts: Sequence[Draft], rows: int, seconds: Callable[[int], float], most: int = MOST_ROWS
    ) -> list[int]:
        return [min(self._count, len(draft)) for draft in drafts]

    def chain(
        self,
        survival: Sequence[float],
        seconds: Callable[[int], float],
        seconds_per_candidate: float,
        others: int = 0,
        free: Draft | None = None,
    ) -> int:
        return min(self._count, len(survival))
