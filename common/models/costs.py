"""What a pass costs by its number of rows on this device, measured once per decoder."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

ROWS_TIMED = (1, 2, 4, 8, 16, 32, 64)  # rows that are timed; between them costs are interpolated
_SECONDS, _ROUNDS = 0.06, 50  # spent on each size, whichever comes first, unless one pass takes longer
_WARM_UP = 2  # passes of each size: the first pays for allocations and compilation, the second for capturing a graph
_LEAST_ROW = 0.02  # of a pass, by which each further row counts at least: a flat measurement is noise, and would keep
# rows for drafts that are never right


class PassCosts:
    """Seconds of a pass over so many rows."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """seconds: by rows, at least one entry; beyond the largest the last slope goes on."""
        self._sizes = sorted(seconds)
        self._seconds = [seconds[size] for size in self._sizes]

    def __call__(self, rows: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, rows), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return seconds[left] + slope * (rows - sizes[left])


def measure(timed: Callable[[int], float], sizes: Sequence[int]) -> PassCosts:
    """Times a few passes of each size; timed(rows) runs one and returns its seconds."""
    for size in [*sizes] * _WARM_UP:
        timed(size)
    rounds: list[list[float]] = []
    spent = 0.0
    # Round by round, so that a disturbance does not fall on one size only.
    while not rounds or (spent < _SECONDS * len(sizes) and len(rounds) < _ROUNDS):
        rounds.append([timed(size) for size in sizes])
        spent += sum(rounds[-1])
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    one = min(fastest)  # more rows never cost less
    return PassCosts(
        {
            size: max(*fastest[: i + 1], one * (1 + _LEAST_ROW * (size - 1))) if i else one
            for i, size in enumerate(sizes)
        }
    )
