"""The Drafter contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and the distribution [len(tokens), vocab] each was sampled from; None is a point mass."""

    tokens: list[int] = field(default_factory=list)
    probs: Tensor | None = None


class Drafter(ABC):
    """Proposes what comes next in one sequence. It sees every committed token, prompt first, exactly once."""

    takes_passes = False  # whether a drafted token costs a pass of some decoder, or next to nothing
    passes = 0  # such passes so far
    weight_bytes = 0  # of weights read by them

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """Takes tokens that were committed."""

    @abstractmethod
    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        """A draft of at most `gamma` tokens that would follow; empty where there is nothing to go by.

        pending: tokens that stand behind the committed ones but may yet be taken back.
        """

    def seconds_per_token(self) -> float:
        """What drafting a token will take, for as long as nothing was drafted; next to nothing unless it says more."""
        return 0.0

    def finish(self) -> None:
        """The sequence is over."""
        return
