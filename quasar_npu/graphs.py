"""Verification windows as captured NPU graphs: one launch for the whole pass instead of hundreds.

A graph repeats the same kernels on the same addresses. So what changes from window to window, token ids and
positions, is written into one device buffer before each replay, in one copy that the host does not wait for; and
attention looks at the whole cache through a mask made from the positions. (The alternative, handing each attention
kernel its new length by `graph.update`, costs a host call per layer and window.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.backends.base import Forward, WindowPass
from quasar_npu.cache import NpuCache, Places

_LONGEST = 40  # tokens: above the largest draft there is; longer passes are bound by arithmetic, not by launches

log = logging.getLogger(__name__)


def graphs_wanted() -> bool:
    """QUASAR_NPU_GRAPHS=0 turns capture off, for drivers that hang in it."""
    return os.environ.get("QUASAR_NPU_GRAPHS", "1") != "0"


class WindowGraphs:
    """The window pass of one sequence. A size is run plainly at first, which warms it up, then captured, then replayed.

    Where the driver refuses to capture, windows go on running plainly, with one warning.
    """

    def __init__(self, forward: Forward, cache: NpuCache, plain: WindowPass) -> None:
        self._forward, self._cache, self._plain = forward, cache, plain
        self._columns = torch.arange(cache.capacity, device=cache.memory.device)
        self._warm: set[tuple[int, int]] = set()  # tokens, keep
        self._graphs: dict[tuple[int, int], _WindowGraph] = {}
        self._failed = False

    def __call__(self, ids: Sequence[int], keep: int) -> Tensor:
        shape = (len(ids), keep)
        graph = self._graphs.get(shape)
        if graph is None and shape in self._warm and not self._failed and len(ids) <= _LONGEST:
            graph = self._capture(shape)
        if graph is None:
            self._warm.add(shape)
            return self._plain(ids, keep)
        return graph.replay(ids)

    def _capture(self, shape: tuple[int, int]) -> _WindowGraph | None:
        try:
            graph = _WindowGraph(self._forward, self._cache, self._columns, *shape)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            log.warning("NPU graph capture failed (%s); windows run without graphs, slower", reason)
            self._failed = True
            return None
        self._graphs[shape] = graph
        return graph


class _WindowGraph:
    def __init__(self, forward: Forward, cache: NpuCache, columns: Tensor, size: int, keep: int) -> None:
        self._cache, self._size = cache, size
        slots = cache.slots_on_host(size)
        self._host = torch.empty(2 * size + slots.numel(), dtype=torch.int64).pin_memory()
        self._write([0] * size)
        self._device = self._host.to(columns.device)
        ids, positions, flat = self._device.split([size, size, slots.numel()])
        self._graph = torch.npu.NPUGraph()
        try:
            with torch.inference_mode(), torch.npu.graph(self._graph):
                hidden = columns > positions[:, None]
                cache.captured = Places(flat.view(*slots.shape, 1), positions, hidden)
                self._logits = forward(ids, cache, keep)
        finally:
            cache.captured = None

    def _write(self, ids: Sequence[int]) -> None:
        start, size = self._cache.length, self._size
        self._host[:size] = torch.tensor(ids)
        self._host[size : 2 * size] = torch.arange(start, start + size)
        self._host[2 * size :] = self._cache.slots_on_host(size).flatten()

    def replay(self, ids: Sequence[int]) -> Tensor:
        if self._size > self._cache.free:
            raise ValueError(f"{self._size} tokens do not fit the KV cache: {self._cache.free} positions are free")
        self._write(ids)
        # The tokens of the last window have come back, so the device is done with this buffer.
        self._device.copy_(self._host, non_blocking=True)
        self._graph.replay()
        return self._logits
