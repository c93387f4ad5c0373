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

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """Takes tokens that were committed."""

    @abstractmethod
    def propose(self, gamma: int) -> Draft:
        """A draft of at most `gamma` tokens that would follow; empty where there is nothing to go by."""
