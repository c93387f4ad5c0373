"""Passes as captured CUDA graphs: one launch for the whole pass instead of hundreds.

A graph repeats the same kernels on the same addresses. What changes from pass to pass, ids, positions, pages, what
each program of attention does, is written to the device before each replay, in one copy that the host does not wait
for; kernels read it there. A batch runs in the graph of the next larger bucket (`batches.Shape`), its missing rows
filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quasar.backends.base import AttentionSpec, Batch
from quasar_gpu.batches import PassInputs


class Graph(Protocol):
    """torch.cuda.CUDAGraph, as far as it is needed."""

    def replay(self) -> None: ...


class PaddedBatch(Batch):
    """A batch as a captured pass sees it: tables at fixed addresses, rows filled up, all logits kept."""

    def __init__(self, batch: Batch, inputs: PassInputs, heads: AttentionSpec) -> None:
        self.segments, self.inputs, self.heads = batch.segments, inputs, heads
        self.keeps_all = True

    @property
    def rows(self) -> int:
        return self.inputs.shape.rows


class Replays(Protocol):
    """The backend, as far as a captured pass needs it."""

    def replay(self, captured: CudaPass, batch: Batch) -> Tensor: ...


@dataclass
class CudaPass:
    """A captured pass. It never holds the decoder, or neither would ever be freed."""

    backend: Replays
    graph: Graph
    inputs: PassInputs
    heads: AttentionSpec
    all_logits: Tensor  # [bucket, vocab], the memory of all passes
    logits: Tensor  # [kept rows, vocab] of the last one

    def replay(self, batch: Batch) -> Tensor:
        self.logits = self.backend.replay(self, batch)
        return self.logits


def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> Graph:
    """A graph of what `run` launches. It has run before, so nothing is compiled or allocated here; it is not kept."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        # Of this card: torch's own stream for captures belongs to the card that was used first.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken already
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
    return graph
