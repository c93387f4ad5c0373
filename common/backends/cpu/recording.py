"""Passes on CPU that are recorded once and made again: one call into C instead of hundreds.

The decoder runs once over a stand-in batch, and its kernel calls are recorded instead of made (kernels.Recording).
Every pass then makes them, whatever its rows and whichever sequences they belong to. What would not be repeated, any
operation of PyTorch's own, is refused while recording: then the decoder's passes go on running plainly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quasar.backends.base import Batch, Forward, Segment
from quasar.backends.cpu import kernels
from quasar.backends.cpu.slot import CpuSlot

LONGEST = 1024  # rows of a recorded pass
_MOST_KEPT = 256  # rows of logits: a recording holds the memory of the largest pass that it made


def pass_key(batch: Batch) -> Hashable | None:
    """What a recording depends on: not on the rows, how they are divided among sequences, nor on their slots."""
    if not 0 < batch.rows <= LONGEST or len(batch.kept_rows) > _MOST_KEPT:
        return None
    return (torch.get_num_threads(), kernels.instruction_set())


def segments_of(batch: Batch, table: kernels.Segments | None = None) -> kernels.Segments:
    """The table of a batch over CpuSlots, or `table` filled with it."""
    table = table or kernels.Segments(batch.rows)
    table.fill(
        [(s.slot.memory.pointer, s.slot.length, len(s.ids), s.parents, s.logits_to_keep) for s in batch.segments]
    )
    return table


class RecordedPass:
    """The passes of a decoder."""

    def __init__(self, forward: Forward, batch: Batch) -> None:
        """Records, and makes the pass over `batch`."""
        self._ids = torch.zeros(LONGEST, dtype=torch.int64)
        self._segments = kernels.Segments(LONGEST)
        slot = CpuSlot(layers=1, kv_heads=1, capacity=2, head_dim=16, kv="float32")
        two = Batch([Segment(slot, [0, 0])])  # which no kernel sees: rows and kept rows differ
        two.on_device = self._segments
        with kernels.recording(two.rows) as self._recording, _KernelsOnly():
            logits = forward(self._ids[: two.rows], two)
        self._recording.finish(logits)
        self.logits = self.replay(batch)

    def replay(self, batch: Batch) -> Tensor:
        """The pass over another batch: float32 [kept rows, vocab], overwritten by the next one.

        Raises ValueError or IndexError where the batch does not fit."""
        self._place(batch)
        return self._recording.replay(batch.rows, len(batch.kept_rows))

    def timed_replay(self, batch: Batch) -> list[tuple[str, float]]:
        """The same: the name of each kernel call, and its seconds until all threads had done it."""
        self._place(batch)
        return self._recording.timed_replay(batch.rows, len(batch.kept_rows))

    def _place(self, batch: Batch) -> None:
        segments_of(batch, self._segments)
        self._ids[: batch.rows] = torch.tensor(batch.ids)


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
