"""Verification windows as captured CUDA graphs: one launch for the whole pass instead of hundreds.

A graph repeats the same kernels on the same addresses. What changes from window to window, where it starts and its ids,
is written to the device before each replay, in one copy that the host does not wait for; kernels read it there. What a
grid is made from, the number of tokens and the reach of attention, is what graphs are told apart by.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quasar.backends.base import Forward
from quasar.backends.reference import MAX_WINDOW
from quasar_gpu.cache import CudaCache, reach_bucket

log = logging.getLogger(__name__)


class Graph(Protocol):
    """torch.cuda.CUDAGraph, as far as it is needed."""

    def replay(self) -> None: ...


@dataclass
class Captured:
    """The graphs of one decoder over one cache's memory, by (tokens, keep, reach), each with its logits.

    None stands for a window that has run plainly, which compiled and warmed up its kernels. The logits' memory is the
    graph's own: graphs never hold the decoder itself, or neither would ever be freed.
    """

    graphs: dict[tuple[int, int, int], tuple[Graph, Tensor] | None] = field(default_factory=dict)
    failed: bool = False


class WindowGraphs:
    """The window pass of one sequence. A kind of window is run plainly at first, then captured, then replayed.

    Where the driver refuses to capture, windows go on running plainly, with one warning.
    """

    def __init__(self, forward: Forward, cache: CudaCache) -> None:
        self._forward, self._cache = forward, cache
        self._captured = cache.memory.captured.setdefault(forward, Captured())

    def __call__(self, ids: Sequence[int], keep: int) -> Tensor:
        tokens, cache = len(ids), self._cache
        if tokens > MAX_WINDOW:  # a prompt rather than a window: no graph for it
            return self._forward(torch.tensor(ids, device=cache.k.device), cache, keep)
        if tokens > cache.free:
            raise ValueError(f"{tokens} tokens do not fit the KV cache: {cache.free} positions are free")
        on_device = cache.write_window(ids)
        key = (tokens, keep, reach_bucket(cache.length + tokens))
        if key in self._captured.graphs and self._captured.graphs[key] is None and not self._captured.failed:
            self._capture(key, on_device)
        found = self._captured.graphs.setdefault(key, None)
        if found is None:
            return self._forward(on_device, cache, keep)
        graph, logits = found
        graph.replay()
        return logits

    def _capture(self, key: tuple[int, int, int], ids: Tensor) -> None:
        try:
            self._captured.graphs[key] = capture(lambda: self._forward(ids, self._cache, key[1]), ids.device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            log.warning("CUDA graph capture failed (%s); windows run without graphs, slower", reason)
            self._captured.failed = True


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
    """A graph of what `run` launches, and where its result will be. `run` is not kept."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this card: torch's own for capture belongs to the card that was used first. Other threads may go on.
    stream = torch.cuda.Stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return graph, output
