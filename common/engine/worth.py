"""Whether asking a drafter pays: what it brings, against the time that it takes from everybody."""

from __future__ import annotations

from math import ceil

_FADING = 0.9  # of what earlier steps said
_TRIAL = 4  # steps in which a drafter is asked whatever it brings
_SHARE = 0.01  # of all time, which drafters that do not pay may take together


class Worth:
    """Of one sequence's drafter. A token is worth the time that the engine takes for one at present."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._seconds = 0.0
        self._rest, self._left = 1, 0

    def is_asked(self) -> bool:
        """Whether it is asked in this step; called once a step."""
        self._left = max(0, self._left - 1)
        return not self._left

    def learn(self, accepted: int, seconds: float, token_seconds: float, step_seconds: float, drafters: int) -> None:
        """After a step in which it was asked.

        accepted: its candidates that were right; seconds: that it took, its rows in the pass included; token_seconds:
        that the engine takes for a token; step_seconds: for a step; drafters: of all sequences that run.
        """
        self._steps = _FADING * self._steps + 1
        self._tokens = _FADING * self._tokens + accepted
        self._seconds = _FADING * self._seconds + seconds
        if self._tokens * token_seconds >= self._seconds or self._steps < sum(_FADING**i for i in range(_TRIAL)):
            self._rest = 1
        else:
            longest = ceil(self._seconds / self._steps * drafters / (_SHARE * step_seconds))
            self._rest = max(1, min(2 * self._rest, longest))
        self._left = self._rest
