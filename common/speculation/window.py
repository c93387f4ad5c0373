"""How many tokens to draft: from measured acceptance and cost, so that drafting is never slower than plain decoding
for long."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from statistics import median

MAX_GAMMA = 5  # the published setting
MAX_AUTO_GAMMA = 15  # a window of 16, the most that every backend verifies row by row


class Window(ABC):
    """Chooses gamma before each pass and learns from what was accepted."""

    @abstractmethod
    def gamma(self) -> int:
        """Tokens to draft now; 0 is a plain step."""

    @abstractmethod
    def observe(self, drafted: int, accepted: int, seconds: float, rows: int, pass_seconds: float) -> None:
        """Of `drafted` proposed tokens, which took `seconds` to draft, the first `accepted` were right; verifying them
        took a pass over `rows` tokens and pass_seconds, all that surrounds a pass included.

        A plain step's unverified draft counts too: comparing it with the token that came is free, and is how a
        window that closed opens again.
        """


class FixedWindow(Window):
    """The same gamma every time."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def gamma(self) -> int:
        return self._gamma

    def observe(self, drafted: int, accepted: int, seconds: float, rows: int, pass_seconds: float) -> None:
        return


class AdaptiveWindow(Window):
    """The gamma that commits most tokens per second at the acceptance rate seen lately.

    With acceptance rate a, a window of g commits (1 - a^(g+1)) / (1 - a) tokens on average (Leviathan et al. 2023,
    eq. 1) and costs one pass over g + 1 tokens, what surrounds every pass whatever its size, and the drafting of g.
    Where no g beats a plain step the window closes.
    A drafter that costs nothing goes on guessing unverified; one that takes passes is left alone for a cooldown, then
    tried with its least window, and the cooldown doubles each time that does not pay.
    """

    RATE = 0.12  # weight of the newest outcome in the running acceptance rate, after the first few
    COOLDOWN = (8, 64)  # plain steps per token of the least window, at first and at most
    TIMES = 5  # latest times of which the median counts: one interruption should not close a window

    def __init__(
        self,
        pass_seconds: Callable[[int], float],
        *,
        drafts_are_free: bool = True,
        draft_seconds: float = 0.0,
        acceptance: float = 0.5,
        least: int = 1,
        max_gamma: int = MAX_AUTO_GAMMA,
    ) -> None:
        """pass_seconds: of a pass over so many tokens; draft_seconds (per token) and acceptance: to begin with;
        least: the smallest window but 0, for drafters that are slow to start.
        """
        self._pass_seconds = pass_seconds
        self._seconds = [pass_seconds(g + 1) for g in range(max_gamma + 1)]
        self._around = deque([0.0] * 2, maxlen=self.TIMES)  # seconds of a step beyond its pass
        self._free, self._acceptance, self._tested = drafts_are_free, acceptance, 1
        self._draft_seconds = deque([draft_seconds] * 2, maxlen=self.TIMES)  # per token
        self._least, self._cooldown, self._waited = least, least * self.COOLDOWN[0], 0
        self._best = self._most_per_second()

    def gamma(self) -> int:
        if self._best or self._free:
            return self._best
        self._waited += 1
        if self._waited <= self._cooldown:
            return 0
        self._waited = 0
        self._cooldown = min(2 * self._cooldown, self._least * self.COOLDOWN[1])
        return self._least

    def _most_per_second(self) -> int:
        a, most, best, tokens, power = self._acceptance, 0.0, 0, 0.0, 1.0
        drafting, around = median(self._draft_seconds), max(median(self._around), 0.0)
        for g, seconds in enumerate(self._seconds):
            tokens += power
            power *= a
            rate = tokens / (seconds + around + g * drafting)
            if rate > most and (g == 0 or g >= self._least):
                most, best = rate, g
        return best

    def observe(self, drafted: int, accepted: int, seconds: float, rows: int, pass_seconds: float) -> None:
        self._around.append(pass_seconds - self._pass_seconds(rows))
        if not drafted:
            return
        self._draft_seconds.append(seconds / drafted)
        # What was tested: the accepted tokens and, unless all were, the one that was not. The rest is unknown.
        for hit in [1.0] * accepted + [0.0] * (accepted < drafted):
            self._tested += 1
            self._acceptance += max(self.RATE, 1 / self._tested) * (hit - self._acceptance)  # at first a plain average
        if self._best or accepted:  # a miss opens no closed window
            self._best = self._most_per_second()
        if self._best:
            self._cooldown = self._least * self.COOLDOWN[0]
