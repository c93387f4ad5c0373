"""How many tokens to draft: from measured acceptance, so that drafting is never slower than plain decoding for long."""

from __future__ import annotations

from abc import ABC, abstractmethod

MAX_GAMMA = 5  # the published setting


class Window(ABC):
    """Chooses gamma before each pass and learns from what was accepted."""

    @abstractmethod
    def gamma(self) -> int:
        """Tokens to draft now; 0 is a plain step."""

    @abstractmethod
    def observe(self, drafted: int, accepted: int) -> None:
        """Of `drafted` proposed tokens the first `accepted` were right. A plain step's unverified draft counts too:
        comparing it with the token that came is free, and is how a window that closed opens again."""


class FixedWindow(Window):
    """The same gamma every time."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def gamma(self) -> int:
        return self._gamma

    def observe(self, drafted: int, accepted: int) -> None:
        return


class AdaptiveWindow(Window):
    """The gamma that commits most tokens per unit of time at the acceptance rate seen lately.

    With acceptance rate a, a window of g commits (1 - a^(g+1)) / (1 - a) tokens on average (Leviathan et al. 2023,
    eq. 1) and costs 1 + COST * g plain steps. Where a falls below COST the best g is 0.
    """

    COST = 0.12  # of one more row in a pass; memory-bound passes cost less, so this errs towards plain decoding
    RATE = 0.12  # weight of the newest outcome in the running acceptance rate

    def __init__(self, max_gamma: int = MAX_GAMMA) -> None:
        self._max = max_gamma
        self._acceptance = 0.7

    def gamma(self) -> int:
        a = self._acceptance

        def tokens_per_time(g: int) -> float:
            return sum(a**i for i in range(g + 1)) / (1 + self.COST * g)

        return max(range(self._max + 1), key=tokens_per_time)

    def observe(self, drafted: int, accepted: int) -> None:
        # What was tested: the accepted tokens and, unless all were, the one that was not. The rest is unknown.
        for hit in [1.0] * accepted + [0.0] * (accepted < drafted):
            self._acceptance += self.RATE * (hit - self._acceptance)
