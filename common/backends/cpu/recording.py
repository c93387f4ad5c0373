"""Passes on CPU that are recorded once and made again: one call into C instead of hundreds.

The pass runs through the decoder once for each number of rows, and its kernel calls are recorded (kernels.Recording).
The next pass of that many rows makes them again, whichever sequences they belong to. What would not be repeated, any
operation of PyTorch's own, is refused while recording: then the decoder's passes go on running plainly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quasar.backends.base import Batch, Forward
from quasar.backends.cpu import kernels

LONGEST = 64  # rows: longer passes are bound by arithmetic


def pass_key(batch: Batch) -> Hashable | None:
    """What a recording depends on: not on how the rows are divided among sequences, nor on their slots."""
    if not 0 < batch.rows <= LONGEST:
        return None
    kept = batch.rows
    if not batch.keeps_all:
        rows = batch.kept_rows
        kept = len(rows)
        if not rows or rows[0] != batch.rows - kept:  # picking rows is no kernel of ours
            return None
    return (batch.rows, kept, torch.get_num_threads(), kernels.instruction_set())


def segments_of(batch: Batch, table: kernels.Segments | None = None) -> kernels.Segments:
    """The table of a batch over CpuSlots, or `table` filled with it."""
    table = table or kernels.Segments(batch.rows)
    table.fill([(s.slot.memory.pointer, s.slot.length, len(s.ids), s.parents) for s in batch.segments])
    return table


class RecordedPass:
    """A pass that was recorded as it ran. Its results lie in memory that a decoder's passes share."""

    def __init__(self, forward: Forward, batch: Batch, shared: kernels.SharedMemory) -> None:
        self._ids = torch.tensor(batch.ids)
        self._segments = kernels.Segments(batch.rows)
        batch.on_device = self._segments
        with kernels.recording() as self._recording, _KernelsOnly():
            logits = forward(self._ids, batch)
        self._shape = logits.shape
        self._shared = shared
        self._offset = self._recording.share(shared, logits)
        self.logits.copy_(logits)

    @property
    def logits(self) -> Tensor:
        """float32 [kept rows, vocab], overwritten by the decoder's next pass."""
        nbytes = 4 * self._shape.numel()
        return self._shared.memory[self._offset : self._offset + nbytes].view(torch.float32).view(self._shape)

    def replay(self, batch: Batch) -> Tensor:
        """The pass over another batch of the same key. Raises ValueError or IndexError where it does not fit."""
        segments_of(batch, self._segments)
        self._ids.copy_(torch.tensor(batch.ids))
        self._recording.replay()
        return self.logits

    def timed_replay(self) -> list[tuple[str, float]]:
        """The last pass once more: the name of each kernel call, and its seconds until all threads had done it."""
        return self._recording.timed_replay()


class _KernelsOnly(TorchDispatchMode):
    """Refuses, with NotImplementedError, every operation of PyTorch's that computes: a replay would leave it out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and importing what would skip it takes a second

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func is torch.ops.aten.empty.memory_format:
            return func(*args, **(kwargs or {}))
        raise NotImplementedError(f"{func} is no kernel of ours")
