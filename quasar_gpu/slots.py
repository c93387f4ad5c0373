"""Keys and values on a card: pages of 128 positions, from a pool that outlives the sequences.

A page holds all layers of its positions. Its address is written to the device for each pass, counted from the pool's
first page, so a captured pass serves whatever pages a sequence has; prefixes are shared page by page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import Slot
from quasar_gpu.kernels.attention import PAGE, UNIT, move_rows
from quasar_gpu.kernels.launch import MOST_ROWS


@dataclass(eq=False)
class Page:
    """memory [layers, 2, kv_heads, PAGE, head_dim]: keys, then values; `users`: slots that have it."""

    memory: Tensor
    at: int  # its address, in UNITs from the pool's first page
    users: int = 0


class PagePool:
    """The pages of one shape on one card. Memory grows as slots are made, and is used again for those that follow."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        require_memory: Callable[[int, str], None],
    ) -> None:
        if head_dim % UNIT:
            raise ValueError(f"head_dim {head_dim} is no multiple of {UNIT}")
        self.shape = (layers, 2, kv_heads, PAGE, head_dim)
        self.dtype, self.device = dtype, device
        self._require_memory = require_memory
        self._free: list[Page] = []
        with torch.inference_mode(False):  # written to inside and outside of it
            # Never given out: addresses are counted from it. Kernels take a layer's heads from here.
            self.first = torch.zeros(self.shape, dtype=dtype, device=device)
        self.layer_k = [layer[0] for layer in self.first]  # [kv_heads, PAGE, head_dim] each
        self.layer_v = [layer[1] for layer in self.first]

    @property
    def page_bytes(self) -> int:
        return self.first.nbytes

    def take(self, count: int, what: str) -> list[Page]:
        """Pages for a slot. Raises QuasarError, naming `what`, where the card is too full."""
        if (more := count - len(self._free)) > 0:
            self._require_memory(more * self.page_bytes, what)
            self._free += [self._allocate() for _ in range(more)]
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            page.users = 1
        return taken

    def _allocate(self) -> Page:
        with torch.inference_mode(False):
            memory = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        distance = memory.data_ptr() - self.first.data_ptr()
        unit = UNIT * self.dtype.itemsize
        if distance % unit:
            raise RuntimeError(f"a page lies {distance} bytes from the first, no multiple of {unit}")
        return Page(memory, distance // unit)

    def give_back(self, pages: Sequence[Page]) -> None:
        """From a slot that is done with them."""
        for page in pages:
            page.users -= 1
            if not page.users:
                self._free.append(page)

    def release(self) -> None:
        """Lets go of pages that no slot has."""
        self._free.clear()


class PagedSlot(Slot):
    """One sequence's pages, all of them there from the start."""

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self.pool, self.capacity, self.length = pool, capacity, 0
        self.pages: list[Page] = pool.take(-(-capacity // PAGE), f"a KV cache for {capacity} tokens")

    def __del__(self) -> None:
        if "pages" in vars(self):  # not where there was no memory for them
            self.pool.give_back(self.pages)

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.pool.page_bytes

    @property
    def k(self) -> Tensor:
        """A copy of the keys [layers, kv_heads, capacity, head_dim]; `write` changes them."""
        return self._read(0)

    @property
    def v(self) -> Tensor:
        """A copy of the values."""
        return self._read(1)

    def _read(self, half: int) -> Tensor:
        return torch.cat([page.memory[:, half] for page in self.pages], dim=2)[:, :, : self.capacity]

    def write(self, first: int, k: Tensor, v: Tensor) -> None:
        """Sets keys and values [layers, kv_heads, positions, head_dim] from position `first` on."""
        self.own(first, first + k.shape[2])
        for i in range(k.shape[2]):
            page, row = divmod(first + i, PAGE)
            self.pages[page].memory[:, 0, :, row] = k[:, :, i]
            self.pages[page].memory[:, 1, :, row] = v[:, :, i]

    def address(self, position: int) -> int:
        """Of a position's keys of the first layer and head, in UNITs from the pool's first page."""
        page, row = divmod(position, PAGE)
        return self.pages[page].at + row * self.pool.shape[-1] // UNIT

    def own(self, first: int, last: int) -> None:
        """Makes copies of the pages that positions first .. last - 1 are about to be written to and others share."""
        for i in range(first // PAGE, -(-last // PAGE)):
            if self.pages[i].users > 1:
                (mine,) = self.pool.take(1, "a page of its own for a shared prefix")
                mine.memory.copy_(self.pages[i].memory)
                self.pool.give_back([self.pages[i]])
                self.pages[i] = mine

    def _move(self, positions: Sequence[int], to: int) -> None:
        for first in range(0, len(positions), MOST_ROWS):  # the path ascends: what is overwritten was read before
            some = positions[first : first + MOST_ROWS]
            pairs = [[self.address(p) for p in some], [self.address(to + first + i) for i in range(len(some))]]
            host = torch.tensor(pairs, dtype=torch.int64, pin_memory=self.pool.first.is_cuda)
            moves = host.to(self.pool.device, non_blocking=True)
            move_rows(self.pool.first, moves, self.pool.shape[-1])

    def share_prefix(self, other: Slot, length: int) -> None:
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"cannot share {length} positions of {other.length} with a slot for {self.capacity}")
        if not isinstance(other, PagedSlot) or other.pool is not self.pool:
            raise ValueError("slots of different models share nothing")
        if other is self:
            self.length = length
            return
        whole, more = divmod(length, PAGE)
        for i in range(whole):
            other.pages[i].users += 1
            self.pool.give_back([self.pages[i]])
            self.pages[i] = other.pages[i]
        if more:
            self.own(whole * PAGE, length)
            self.pages[whole].memory[:, :, :, :more] = other.pages[whole].memory[:, :, :, :more]
        self.length = length
