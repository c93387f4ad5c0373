"""Where sequences keep their keys and values: slots, bounded in number and bytes, and what ended ones still hold.

A new prompt takes over, or copies, the longest prefix that a slot holds. The least recently used idle slots go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from quasar.backends.base import Slot
from quasar.models.runtime import Runtime

_SHARED_PREFIX = 32  # tokens from which on a prompt waits for another that is about to hold its prefix
_CAPACITY_STEP = 64  # slots are this much roomier than needed, so that the next prompt may fit them


@dataclass(frozen=True)
class Held:
    """A running sequence: its slot and the text of which the slot holds the beginning."""

    slot: Slot
    tokens: Sequence[int]
    prefilling: bool


class SlotPool:
    """Slots of one runtime: those that run belong to their sequences, the idle ones are kept here for their prefix."""

    def __init__(self, runtime: Runtime, most: int, bytes_limit: int) -> None:
        """most: slots, running and idle; bytes_limit: of their keys and values together."""
        self._runtime = runtime
        self._most, self.bytes_limit = most, bytes_limit
        self._idle: OrderedDict[Slot, list[int]] = OrderedDict()  # the least recently used first
        self.queried_tokens = self.found_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all idle slots."""
        return sum(slot.nbytes for slot in self._idle)

    def bytes_for(self, capacity: int) -> int:
        """Bytes of keys and values of so many positions."""
        return self._runtime.kv_bytes_per_position * capacity

    def put(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Keeps the slot of a sequence that ended; tokens: the whole text, of which it holds the beginning."""
        self._idle[slot] = list(tokens[: slot.length])

    def take(self, tokens: Sequence[int], capacity: int, running: Sequence[Held]) -> Slot | None:
        """A slot for a prompt, with the longest prefix of it that any slot holds. None where it had better wait: for
        memory to become free, or for a running prompt that is about to hold more of its prefix than any slot does.
        At least the prompt's last token is not in the slot: its logits are wanted."""
        prompt = tokens[:-1]
        idle, idle_length = self._longest(prompt)
        source, length, coming = idle, idle_length, 0
        for held in running:
            shared = common_prefix(prompt, held.tokens)
            if held.prefilling:
                coming = max(coming, shared)
            if (here := min(shared, held.slot.length)) > length:
                source, length = held.slot, here
        if coming >= length + _SHARED_PREFIX:
            return None
        if idle is not None and idle_length == length and idle.capacity >= capacity:
            slot = self._remove(idle, length)
        else:
            found = self._empty(capacity, running, keep=source)
            if found is None:
                return None
            slot = found
            if source is not None and length:
                slot.share_prefix(source, length)
        self.queried_tokens += len(prompt)
        self.found_tokens += length
        return slot

    def _longest(self, prompt: Sequence[int]) -> tuple[Slot | None, int]:
        """The idle slot that shares the longest prefix with a prompt, and its length."""
        best, length = None, 0
        for slot, tokens in self._idle.items():
            common = common_prefix(prompt, tokens)
            if common > length:
                best, length = slot, common
        return best, length

    def _remove(self, slot: Slot, length: int) -> Slot:
        """Takes an idle slot, of which the first `length` positions stay."""
        del self._idle[slot]
        slot.rewind(length)
        return slot

    def _empty(self, capacity: int, running: Sequence[Held], keep: Slot | None) -> Slot | None:
        """An empty slot: an idle one of fitting size or a new one, for which old ones go; `keep` stays if it can."""
        fitting = next((slot for slot in self._idle if capacity <= slot.capacity <= 2 * capacity), None)
        if fitting is not None and fitting is not keep and len(running) + len(self._idle) >= self._most:
            return self._remove(fitting, 0)
        roomy = min(-(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP, self._runtime.config.max_position_embeddings)
        needed = self.bytes_for(roomy)
        used = self.nbytes + sum(held.slot.nbytes for held in running)
        while self._idle and (used + needed > self.bytes_limit or len(running) + len(self._idle) >= self._most):
            oldest, _ = self._idle.popitem(last=False)
            used -= oldest.nbytes
        if used + needed > self.bytes_limit and running:
            return None
        return self._runtime.new_slot(roomy)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
