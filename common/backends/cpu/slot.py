"""Keys and values on CPU, in the kernels' memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quasar.backends.base import Slot
from quasar.backends.cpu.kernels import SlotMemory


class CpuSlot(Slot):
    """A sequence's keys and values as the attention kernels read them."""

    def __init__(self, layers: int, kv_heads: int, capacity: int, head_dim: int, kv: str) -> None:
        self.memory = SlotMemory(layers, kv_heads, capacity, head_dim, kv)
        self.capacity = capacity
        self.length = 0

    @property
    def k(self) -> Tensor:
        """A copy: float32 [layers, kv_heads, at least capacity, head_dim]."""
        return self.memory.k

    @property
    def v(self) -> Tensor:
        """A copy: float32 [layers, kv_heads, at least capacity, head_dim]."""
        return self.memory.v

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values for the whole capacity; the system gives them out as text grows."""
        return self.memory.nbytes

    def commit(self, rows: int | Sequence[int]) -> None:
        count = rows if isinstance(rows, int) else len(rows)
        if not 0 <= count <= self.free:
            raise ValueError(f"cannot commit {count} positions: {self.length} of {self.capacity} are in use")
        if not isinstance(rows, int):
            self.memory.keep(self.length, rows)
        self.length += count

    def share_prefix(self, other: Slot, length: int) -> None:
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"cannot share {length} positions of {other.length} with a slot for {self.capacity}")
        self.memory.copy_from(other.memory, length)
        self.length = length

    def repeat(self, length: int) -> None:
        """Commits copies of what is there up to `length` positions: a long context to take times with."""
        if not self.length <= length <= self.capacity:
            raise ValueError(f"cannot go on from {self.length} to {length} positions: there are {self.capacity}")
        self.memory.repeat(self.length, length)
        self.length = length
