"""Whether drafting pays: steps with drafts against steps without, as they were measured in this engine.

Drafts cost more than the rows that they add: the drafters' own time, the runners-up that they learn from, a server that
waits meanwhile. Whole steps count all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

_FADING = 0.97  # of what earlier steps said
_TRIAL = 8  # steps with drafts before the first without
_PLAIN_EVERY = 64  # steps, where drafting pays
_PROBE = 2  # steps with drafts at a time, where it does not
_FIRST_REST, _LONGEST_REST = 8, 128  # steps between them
_MARGIN = 0.98  # of plain decoding's speed, below which drafting does not pay


@dataclass
class _Mean:
    weight: float = 0.0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.weight = _FADING * self.weight + 1
        self.total = _FADING * self.total + value

    def __call__(self) -> float:
        return self.total / self.weight


class _Balance:
    """At one number of sequences."""

    def __init__(self) -> None:
        self.tokens, self.drafting, self.plain = _Mean(), _Mean(), _Mean()  # per sequence; seconds per step
        self.asks, self._left, self._rest = True, _TRIAL, _FIRST_REST

    def learn(self, drafted: bool, tokens: float, seconds: float) -> None:
        if drafted:
            self.tokens.add(tokens)
            self.drafting.add(seconds)
        else:
            self.plain.add(seconds)
        self._left -= 1
        if self._left > 0:
            return
        if not self.plain.weight:
            self.asks, self._left = False, 1
        elif self.tokens() * self.plain() >= _MARGIN * self.drafting():
            # Now and then a step without, to know what one takes.
            self._rest = _FIRST_REST
            self.asks = not self.asks
            self._left = _PLAIN_EVERY if self.asks else 1
        elif self.asks:
            self.asks, self._left = False, self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
        else:
            self.asks, self._left = True, _PROBE


class Worth:
    """Of an engine's drafters together."""

    def __init__(self) -> None:
        self._balances: dict[int, _Balance] = {}

    def asks(self, sequences: int) -> bool:
        """Whether drafters are asked in a step of so many sequences."""
        return self._at(sequences).asks

    def learn(self, sequences: int, drafted: bool, tokens: int, seconds: float) -> None:
        """After a step without prompts. drafted: whether drafters were asked; tokens: that it committed."""
        self._at(sequences).learn(drafted, tokens / sequences, seconds)

    def _at(self, sequences: int) -> _Balance:
        return self._balances.setdefault((sequences - 1).bit_length(), _Balance())
