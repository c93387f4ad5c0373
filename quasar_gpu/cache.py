"""The KV cache on a card: the start position in device memory, and memory that outlives one generation.

Kernels read where a window starts from the device, so that a captured graph serves every position. The memory goes from
one generation to the next together with the graphs that were captured over its addresses: capturing takes about as
long as ten tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quasar.backends.base import Forward, KVCache
from quasar.backends.buffers import unused
from quasar.backends.reference import MAX_WINDOW

if TYPE_CHECKING:
    from quasar_gpu.graphs import Captured

_STEP = 256  # positions; capacities are rounded up to it, so that a slightly longer prompt finds memory that fits
_LEAST_REACH = 1024


def reach_bucket(end: int) -> int:
    """The bound on the positions that attention is launched for: the power of two that holds `end`, 1024 at least.

    It is part of a captured graph, so a growing context needs new graphs only when it doubles.
    """
    return max(_LEAST_REACH, 1 << (end - 1).bit_length())


class CacheMemory:
    """Device memory of one sequence: keys and values [layers, kv_heads, capacity, head_dim] each, where the next window
    starts, its ids, and the graphs over them."""

    def __init__(
        self, layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        with torch.inference_mode(False):  # written to inside and outside of it
            self.k = torch.zeros(layers, kv_heads, capacity, head_dim, dtype=dtype, device=device)
            self.v = torch.zeros_like(self.k)
            self.inputs = torch.zeros(1 + MAX_WINDOW, dtype=torch.int64, device=device)  # start, ids
        self.start = 0  # what inputs[0] is, or will be when the device gets there
        # By decoder, and only as long as it lives: graphs hold the addresses of its weights.
        self.captured: WeakKeyDictionary[Forward, Captured] = WeakKeyDictionary()

    def fits(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> bool:
        """Whether a cache of this size can live here."""
        has = self.k.shape
        return (has[0], has[1], has[3]) == (layers, kv_heads, head_dim) and has[2] >= capacity


class CudaCache(KVCache):
    """One sequence in a CacheMemory, which may have room for more than `capacity`."""

    def __init__(self, memory: CacheMemory, capacity: int) -> None:
        self.memory = memory
        self.k, self.v = memory.k, memory.v
        self.layer_k, self.layer_v = self.k.unbind(), self.v.unbind()
        self.capacity, self.length = capacity, 0

    @property
    def start(self) -> Tensor:
        """int64 [1] on the device: the committed length."""
        start = self.memory.inputs[:1]
        if self.memory.start != self.length:
            start.fill_(self.length)
            self.memory.start = self.length
        return start

    def write_window(self, ids: Sequence[int]) -> Tensor:
        """Start and ids of the next window in one copy that the host does not wait for; returns the ids [tokens] on
        the device, always at the same address."""
        inputs = self.memory.inputs
        # Pinned memory comes from torch's own pool, which hands it out again only once the copy is done.
        host = torch.tensor([self.length, *ids], dtype=torch.int64, pin_memory=inputs.is_cuda)
        inputs[: len(host)].copy_(host, non_blocking=True)
        self.memory.start = self.length
        return inputs[1 : len(host)]


class CachePool:
    """Memory of finished sequences for those that follow: handed out again once no cache refers to it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._memories: list[CacheMemory] = []

    def idle(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> CacheMemory | None:
        """Memory that fits and is not in use. Where there is none, what is not in use is let go."""
        idle = [i for i in range(len(self._memories)) if unused(self._memories, i)]
        for i in idle:
            if self._memories[i].fits(layers, kv_heads, capacity, head_dim):
                return self._memories[i]
        for i in reversed(idle):
            del self._memories[i]
        return None

    def allocate(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> CacheMemory:
        """New memory for at least `capacity` positions."""
        memory = CacheMemory(layers, kv_heads, rounded(capacity), head_dim, self._dtype, self._device)
        self._memories.append(memory)
        return memory


def rounded(capacity: int) -> int:
    """The positions that are allocated for `capacity`."""
    return -(-capacity // _STEP) * _STEP
