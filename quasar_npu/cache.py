"""The KV cache on an NPU, and where a pass writes in it.

Keys and values of a layer are one block of memory, heads outermost: `[2, kv_heads, capacity, head_dim]`. So one
scatter appends both, and the fused attention takes each half as it lies (BNSD).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import KVCache


@dataclass(frozen=True)
class Places:
    """Where the rows of a pass go, on the device.

    slots int64 [2 * kv_heads, tokens, 1]: rows of a layer's memory seen as [2 * kv_heads * capacity, head_dim].
    positions int64 [tokens] and hidden bool [tokens, capacity] (True where a row must not look) are there inside a
    captured graph only: elsewhere the host knows the length and says it.
    """

    slots: Tensor
    positions: Tensor | None = None
    hidden: Tensor | None = None


class NpuCache(KVCache):
    def __init__(
        self, layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.memory = torch.zeros(layers, 2, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.k, self.v = self.memory.unbind(1)  # each [layers, kv_heads, capacity, head_dim], as in KVCache
        self.capacity, self.length = capacity, 0
        self._slot_base = torch.arange(2 * kv_heads)[:, None] * capacity  # on the host
        self._places: tuple[int, int, Places] | None = None
        self.captured: Places | None = None  # set while a graph is captured

    def slots_on_host(self, tokens: int) -> Tensor:
        """int64 [2 * kv_heads, tokens] for the next `tokens` positions."""
        return self._slot_base + torch.arange(self.length, self.length + tokens)

    def places(self, tokens: int) -> Places:
        """For the next `tokens` positions; one copy to the device per pass."""
        if self.captured is not None:
            return self.captured
        if self._places is None or self._places[:2] != (self.length, tokens):
            slots = to_device(self.slots_on_host(tokens)[..., None], self.memory.device)
            self._places = (self.length, tokens, Places(slots))
        return self._places[2]

    def rows(self, layer: int) -> Tensor:
        """A layer's memory as [2 * kv_heads * capacity, head_dim]: keys, then values."""
        return self.memory[layer].view(-1, self.memory.shape[-1])


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True)
