"""What a pass costs by window size on this device: measured once per decoder, on a scratch cache."""

from __future__ import annotations

import time
from bisect import bisect_left
from weakref import WeakKeyDictionary

from quasar.models.decoder import Decoder

SIZES = (1, 2, 4, 8, 16)  # windows that are timed; between them costs are interpolated
_CONTEXT = 16  # positions before the window
_SECONDS, _ROUNDS = 0.06, 50  # spent on each size, whichever comes first, unless one pass takes longer
_WARM_UP = 2  # passes of each size: the first pays for allocations and compilation, the second for capturing a graph
_LEAST_ROW = 0.02  # of a pass, by which each further row counts at least: a flat measurement is noise, and would keep
# a window open for drafts that are never right
_measured: WeakKeyDictionary[Decoder, PassCosts] = WeakKeyDictionary()


class PassCosts:
    """Seconds of a pass over a window of so many tokens."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """seconds: by window size, at least one; beyond the largest the last slope goes on."""
        self._sizes = sorted(seconds)
        self._seconds = [seconds[size] for size in self._sizes]

    def __call__(self, tokens: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, tokens), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return seconds[left] + slope * (tokens - sizes[left])


def pass_costs(decoder: Decoder) -> PassCosts:
    """The decoder's costs; the first call takes a few passes of each size in SIZES."""
    if decoder not in _measured:
        _measured[decoder] = _measure(decoder)
    return _measured[decoder]


def _measure(decoder: Decoder) -> PassCosts:
    backend = decoder.backend
    cache = decoder.new_cache(_CONTEXT + SIZES[-1])
    decoder.prefill([0] * _CONTEXT, cache, keep=0)
    window_pass = backend.window_pass(decoder, cache)

    def timed(size: int) -> float:
        backend.synchronize()
        clock = time.perf_counter()
        backend.argmax(window_pass([0] * size, size)).tolist()
        return time.perf_counter() - clock

    for size in SIZES * _WARM_UP:
        timed(size)
    rounds: list[list[float]] = []
    spent = 0.0
    # Round by round, so that a disturbance does not fall on one size only.
    while not rounds or (spent < _SECONDS * len(SIZES) and len(rounds) < _ROUNDS):
        rounds.append([timed(size) for size in SIZES])
        spent += sum(rounds[-1])
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    one = min(fastest)  # more rows never cost less
    return PassCosts(
        {
            size: max(*fastest[: i + 1], one * (1 + _LEAST_ROW * (size - 1))) if i else one
            for i, size in enumerate(SIZES)
        }
    )
