"""Whether asking drafters pays: what their candidates save, against the time that drafting takes from all sequences."""

from __future__ import annotations

from math import ceil

_FADING = 0.9  # of what earlier steps said
_TRIAL = 4  # steps in which drafters are asked whatever they bring
_SHARE = 0.01  # of all time, which drafters that do not pay may take


class _Balance:
    """At one number of sequences."""

    def __init__(self) -> None:
        self.steps = 0
        self.saved = self.taken = 0.0  # in the latest steps with drafts, as shares of a step without
        self.rest, self.left = 1, 0  # steps from one with drafts to the next


class Worth:
    """Of an engine's drafters together: of many sequences each waits for the drafts of all."""

    def __init__(self) -> None:
        self._balances: dict[int, _Balance] = {}

    def asks(self, sequences: int) -> bool:
        """Whether drafters are asked in a step of so many sequences; called once a step."""
        balance = self._at(sequences)
        balance.left = max(0, balance.left - 1)
        return not balance.left

    def learn(self, sequences: int, accepted: int, taken: float, plain: float) -> None:
        """After a step in which they were asked.

        accepted: candidates that were right; taken: seconds of the step that drafts took, their rows in the pass
        included; plain: its other seconds. A candidate that is right saves a sequence a plain step.
        """
        balance = self._at(sequences)
        balance.steps += 1
        balance.saved = _FADING * balance.saved + accepted / sequences
        balance.taken = _FADING * balance.taken + taken / plain
        if balance.saved >= balance.taken or balance.steps <= _TRIAL:
            balance.rest = 1
        else:
            balance.rest = max(1, min(2 * balance.rest, ceil(taken / plain / _SHARE)))
        balance.left = balance.rest

    def _at(self, sequences: int) -> _Balance:
        return self._balances.setdefault((sequences - 1).bit_length(), _Balance())
