"""What a pass costs by its number of rows on this device: timed once per decoder, then learnt from every pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import exp, log

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows whose seconds are learnt; between them costs are interpolated
_TIMED_FIRST = SIZES[::2]  # the others begin between them: a first draft waits for this
_SECONDS, _ROUNDS = 0.03, 50  # spent on each size, whichever comes first, unless one pass takes longer
_WARM_UP = 2  # passes of each size: the first pays for allocations and compilation, the second for capturing a graph
_LITTLE = 0.5  # what the first timing of a size weighs, in passes
_LEAST_ROW = 0.02  # of a pass, by which each further row counts at least: a flat measurement is noise, and would keep
# rows for drafts that are never right


class PassCosts:
    """Seconds of a pass over so many rows.

    The first timings may fall on a bad moment. So every pass moves the size nearest to it; where it was far from what
    was expected, it is the machine that changed, and all sizes move. A size that has had no pass for long is slowly
    believed to be cheaper, until it is tried. A pass may be slow by accident but not fast: upwards the steps are small.
    """

    RATE, MOST_UP, MOST_DOWN = 0.05, 0.2, 1.0
    FAR = 0.18  # in log seconds
    FORGETTING, FADING = 0.001, 0.98  # each pass, of the other sizes: of their seconds, of their passes

    def __init__(self, seconds: dict[int, float]) -> None:
        """seconds: by rows, at least one entry; beyond the largest the last slope goes on."""
        self._sizes = sorted(seconds)
        self._learnt = [seconds[size] for size in self._sizes]
        self._passes = [0.0] * len(self._sizes)
        self._seconds = list(self._learnt)

    def __call__(self, rows: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, rows), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return seconds[left] + slope * (rows - sizes[left])

    def learn(self, rows: int, seconds: float) -> None:
        """Takes what a pass took."""
        error = min(max(log(seconds / self(rows)), -self.MOST_DOWN), self.MOST_UP)
        nearest = min(range(len(self._sizes)), key=lambda i: abs(log(self._sizes[i] / rows)))
        step = error * max(self.RATE, 1 / (3 + self._passes[nearest]))
        for i, passes in enumerate(self._passes):
            if i == nearest:
                self._learnt[i] *= exp(step)
                self._passes[i] = passes + 1
            else:
                self._learnt[i] *= exp((step if abs(error) > self.FAR else 0) - self.FORGETTING)
                self._passes[i] = passes * self.FADING
        self._seconds = rising(self._sizes, self._learnt, [_LITTLE + passes for passes in self._passes])
        self._learnt = [max(0.8 * s, own) for s, own in zip(self._seconds, self._learnt, strict=True)]


def rising(sizes: Sequence[int], seconds: Sequence[float], weights: Sequence[float]) -> list[float]:
    """More rows never cost less: sizes in the wrong order share their weighted mean. And each row costs a little."""
    blocks: list[tuple[float, float, int]] = []  # seconds, weight, sizes
    for block in zip(seconds, weights, [1] * len(sizes), strict=True):
        while blocks and blocks[-1][0] > block[0]:
            before = blocks.pop()
            weight = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / weight, weight, before[2] + block[2])
        blocks.append(block)
    found = [mean for mean, _, count in blocks for _ in range(count)]
    return [max(s, found[0] * (1 + _LEAST_ROW * (size - sizes[0]))) for size, s in zip(sizes, found, strict=True)]


def measure(timed: Callable[[int], float], most: int) -> PassCosts:
    """Times a few passes of some sizes, up to `most` rows (1 or more); timed(rows) runs one and returns its seconds."""
    sizes = [size for size in _TIMED_FIRST if size <= most]
    for size in sizes * _WARM_UP:
        timed(size)
    rounds: list[list[float]] = []
    spent = 0.0
    # Round by round, so that a disturbance does not fall on one size only.
    while not rounds or (spent < _SECONDS * len(sizes) and len(rounds) < _ROUNDS):
        rounds.append([timed(size) for size in sizes])
        spent += sum(rounds[-1])
    # A pass may be slow by accident but not fast, and fewer rows never cost more.
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    fastest = [min(fastest[i:]) for i in range(len(fastest))]
    between = PassCosts(dict(zip(sizes, rising(sizes, fastest, fastest), strict=True)))
    return PassCosts({size: between(size) for size in SIZES if size <= most})
