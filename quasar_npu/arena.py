"""Keys and values on an NPU: blocks of 128 positions in memory that many sequences share.

The fused attention reads keys through a table of blocks, so one launch serves sequences of any length, and a captured
pass serves other sequences once its table says other blocks. Memory that a captured pass reads never moves and is never
replaced: an arena keeps its size, and where it is full a further one is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.backends.base import Slot

BLOCK = 128  # positions: block_size of the fused attention
SCRATCH = 0  # the block that rows without a sequence write to: the filling of a captured pass


class Arena:
    """`memory` [layers, 2 (keys, values), blocks, 128, kv_heads, head_dim]; a layer's half is what attention takes."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """blocks: those to give away; the scratch block comes on top."""
        self.layers, self.kv_heads, self.head_dim, self.blocks = layers, kv_heads, head_dim, blocks + 1
        # Zeros, since a masked position counts 0 times its value, and 0 times what lies in fresh memory may be NaN.
        self.memory = torch.zeros(layers, 2, self.blocks, BLOCK, kv_heads, head_dim, dtype=dtype, device=device)
        self._free = set(range(1, self.blocks))

    @property
    def free(self) -> int:
        """Blocks that are left."""
        return len(self._free)

    @property
    def empty(self) -> bool:
        """Whether no sequence has a block here."""
        return len(self._free) == self.blocks - 1

    def take(self, count: int) -> list[int]:
        """The lowest free blocks."""
        taken = sorted(self._free)[:count]
        self._free.difference_update(taken)
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        """Takes blocks back."""
        self._free.update(blocks)

    def halves(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [blocks, 128, kv_heads * head_dim]."""
        keys, values = self.memory[layer].view(2, self.blocks, BLOCK, -1)
        return keys, values

    def rows(self, layer: int) -> Tensor:
        """A layer's memory as [2 * blocks * 128 * kv_heads, head_dim]: keys, then values."""
        return self.memory[layer].view(-1, self.head_dim)

    @property
    def values_from(self) -> int:
        """The row of `rows` at which values begin."""
        return self.blocks * BLOCK * self.kv_heads


class NpuSlot(Slot):
    """One sequence's blocks of an arena. They go back when the slot is dropped."""

    def __init__(self, arena: Arena, capacity: int) -> None:
        self.arena, self.capacity, self.length = arena, capacity, 0
        self.blocks = arena.take(-(-capacity // BLOCK))
        weakref.finalize(self, arena.give, tuple(self.blocks)).atexit = False

    @property
    def nbytes(self) -> int:
        memory = self.arena.memory
        return len(self.blocks) * BLOCK * (memory.nbytes // (self.arena.blocks * BLOCK))

    @property
    def k(self) -> Tensor:
        """A copy of the keys, [layers, kv_heads, capacity, head_dim]."""
        return self._copied(0)

    @property
    def v(self) -> Tensor:
        """A copy of the values, [layers, kv_heads, capacity, head_dim]."""
        return self._copied(1)

    def places(self, positions: Sequence[int]) -> list[int]:
        """Where positions of this sequence lie among all of the arena."""
        return [self.blocks[position // BLOCK] * BLOCK + position % BLOCK for position in positions]

    def _flat(self) -> Tensor:
        """The arena as [layers, 2, positions, kv_heads, head_dim]."""
        return self.arena.memory.flatten(2, 3)

    def _index(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(self.places(positions)).to(self.arena.memory.device)

    def _copied(self, half: int) -> Tensor:
        return self._flat()[:, half].index_select(1, self._index(range(self.capacity))).transpose(1, 2)

    def _move(self, positions: Sequence[int], to: int) -> None:
        moved = self._flat().index_select(2, self._index(positions))
        self._flat().index_copy_(2, self._index(range(to, to + len(positions))), moved)

    def share_prefix(self, other: Slot, length: int) -> None:
        """Becomes the first `length` positions of another slot of the same model. Raises ValueError beyond either."""
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"cannot share {length} positions of {other.length} with a slot for {self.capacity}")
        if length:
            assert isinstance(other, NpuSlot)
            copied = other._flat().index_select(2, other._index(range(length)))
            self._flat().index_copy_(2, self._index(range(length)), copied)
        self.length = length


class Arenas:
    """The arenas of one device, by layers, kv_heads and head_dim."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._arenas: dict[tuple[int, int, int], list[Arena]] = {}

    def slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> NpuSlot:
        """An empty slot, in an arena that others of this shape share where there is room."""
        blocks = -(-capacity // BLOCK)
        arenas = self._arenas.setdefault((layers, kv_heads, head_dim), [])
        for arena in arenas:
            if arena.free >= blocks:
                return NpuSlot(arena, capacity)
        arenas[:] = [arena for arena in arenas if not arena.empty]  # too small for what is asked now
        room = self._room(2 * layers * kv_heads * head_dim * BLOCK * self._dtype.itemsize, blocks)
        arenas.append(Arena(layers, kv_heads, head_dim, room, self._dtype, self._device))
        return NpuSlot(arenas[-1], capacity)

    def _room(self, block_bytes: int, blocks: int) -> int:
        """Blocks of a new arena: sixteen sequences of this length, if they fit a quarter of the free memory."""
        free, _ = torch.npu.mem_get_info(self._device.index or 0)
        return max(blocks, min(16 * blocks, free // 4 // block_bytes))
