"""Slots of sequences that ended, kept for prompts that begin as they did."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from quasar.backends.base import Slot


class PrefixCache:
    """Idle slots and the tokens whose keys and values they hold, the least recently used first."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Slot, list[int]] = OrderedDict()
        self.queried_tokens = self.found_tokens = 0

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def nbytes(self) -> int:
        """Bytes of all idle slots."""
        return sum(slot.nbytes for slot in self._idle)

    def put(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Keeps an idle slot; tokens: the whole text, of which the slot holds the beginning."""
        self._idle[slot] = list(tokens[: slot.length])

    def longest(self, prompt: Sequence[int]) -> tuple[Slot | None, int]:
        """The idle slot that shares the longest prefix with a prompt, and its length."""
        best, length = None, 0
        for slot, tokens in self._idle.items():
            common = common_prefix(prompt, tokens)
            if common > length:
                best, length = slot, common
        return best, length

    def take(self, slot: Slot) -> Slot:
        """Removes a slot to be used again."""
        del self._idle[slot]
        return slot

    def oldest(self) -> Slot | None:
        """The slot that was not used for longest."""
        return next(iter(self._idle), None)

    def with_capacity(self, capacity: int) -> Slot | None:
        """The least recently used slot for at least so many positions, but not far more."""
        return next((slot for slot in self._idle if capacity <= slot.capacity <= 2 * capacity), None)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
