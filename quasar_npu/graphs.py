"""Passes as captured NPU graphs: one launch for the whole pass instead of hundreds.

A graph repeats the same kernels on the same addresses. So what changes from pass to pass (token ids, positions, where
keys are written and read) is written into one device buffer before each replay, in one copy that the host does not wait
for. A graph is captured for a number of sequences, rows of each, and a bucket of keys, a power of two: attention reads
the bucket through the table of blocks, masked, so a short context never reads a whole cache. Sequences and rows that a
batch does not have are filled with rows that write to the scratch block and are thrown away.

(The alternative, handing each attention kernel its lengths by `graph.update`, costs a host call per layer and pass.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import Batch, Forward
from quasar_npu.arena import BLOCK, SCRATCH, NpuSlot
from quasar_npu.places import Group, Places, scatter_rows, written

LONGEST = 40  # rows of a sequence: above the largest draft there is
MOST_ROWS = 256  # of a pass: longer ones are bound by arithmetic, not by launches
_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)  # of several sequences; a single one has its own number

log = logging.getLogger(__name__)


def graphs_wanted() -> bool:
    """QUASAR_NPU_GRAPHS=0 turns capture off; TASK_QUEUE_ENABLE=2 makes it impossible, which is said once."""
    if os.environ.get("QUASAR_NPU_GRAPHS", "1") == "0":
        return False
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        log.warning("TASK_QUEUE_ENABLE=2 rules NPU graphs out: passes run without them, slower; set it to 1")
        return False
    return True


@dataclass(frozen=True)
class GraphShape:
    """What a graph is captured for: batches of equal shapes share one."""

    arena: int  # its identity: a graph reads that memory
    sequences: int
    rows: int  # of each sequence
    keys: int  # that attention reads of each sequence, a power of two
    trees: bool

    @classmethod
    def of(cls, batch: Batch) -> GraphShape | None:
        """None for batches that are better launched plainly: prompts, and sequences in different arenas."""
        rows = max(len(segment.ids) for segment in batch.segments)
        count = len(batch.segments)
        slots = [segment.slot for segment in batch.segments]
        if rows > LONGEST or count > _SEQUENCES[-1] or not all(isinstance(slot, NpuSlot) for slot in slots):
            return None
        if not any(segment.logits_to_keep for segment in batch.segments):
            return None
        arena = slots[0].arena
        if any(slot.arena is not arena for slot in slots):
            return None
        sequences = next(n for n in _SEQUENCES if n >= count)
        if sequences > 1:
            rows = next(n for n in _ROWS if n >= rows)
        if sequences * rows > MOST_ROWS:
            return None
        longest = max(segment.slot.length + len(segment.ids) for segment in batch.segments)
        keys = max(BLOCK, 1 << (longest - 1).bit_length())
        trees = any(segment.parents is not None for segment in batch.segments)
        return cls(id(arena), sequences, rows, keys, trees)


class PaddedBatch(Batch):
    """What a captured pass runs over: `sequences` times `rows` rows, whose contents lie in a device buffer."""

    def __init__(self, rows: int, places: CapturedPlaces) -> None:
        super().__init__([])
        self.ids = [0] * rows
        self.first_rows = [0, rows]
        self.captured = places


@dataclass(frozen=True)
class CapturedPlaces:
    """As `Places`, and what the mask is made of on the device: inside the graph, at its beginning."""

    shape: GraphShape
    places: Places
    columns: Tensor  # int32 [keys]: 0, 1, ...; with trees 1, 2, ...
    lengths: Tensor  # int32 [sequences, 1]: committed positions
    positions: Tensor  # int32 [sequences, rows]: the last column that a row of a chain sees
    unseen: Tensor | None  # trees: int32 [sequences, rows, 1 + rows + 1], 1 where a row must not look

    def hidden(self) -> Tensor:
        """bool [sequences, 1, rows, keys]: True where a row must not look."""
        s = self.shape
        if self.unseen is None:
            return (self.columns > self.positions[:, :, None])[:, None]
        # Column c is committed text (0), row c - length of the tree (1 + it), or beyond it (rows + 1).
        of_tree = (self.columns - self.lengths).clamp(0, s.rows + 1).long()  # [sequences, keys]
        index = of_tree[:, None].expand(s.sequences, s.rows, s.keys)
        return self.unseen.gather(2, index).bool()[:, None]


class CapturedGraph:
    """A captured pass. `logits` float32 [kept rows, vocab] of the batch that ran last."""

    def __init__(self, forward: Forward, batch: Batch, shape: GraphShape, device: torch.device) -> None:
        """Runs the pass over the batch: once plainly, which makes whatever is made once, and once as a graph.

        Raises RuntimeError where it cannot be captured; the stream is then what it was.
        """
        self._shape, self._arena = shape, batch.segments[0].slot.arena
        s, rows = shape, shape.sequences * shape.rows
        sizes = {
            "ids": rows,
            "positions": rows,
            "seen": rows,
            "lengths": s.sequences,
            "slots": 2 * rows * self._arena.kv_heads,
            "table": s.sequences * s.keys // BLOCK,
            "unseen": rows * (s.rows + 2) if s.trees else 0,
            "kept": rows,
        }
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.int32).pin_memory()
        self._device = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=device)
        self._part = dict(zip(sizes, self._host.split(list(sizes.values())), strict=True))
        on_device = dict(zip(sizes, self._device.split(list(sizes.values())), strict=True))
        self._kept = on_device["kept"]
        self._copied = torch.npu.Event()
        self._batch = PaddedBatch(rows, self._places(on_device))
        self._send(batch)
        with torch.inference_mode():
            forward(on_device["ids"], self._batch)
            self._graph, self._all_logits = captured(lambda: forward(on_device["ids"], self._batch))
        self.logits = self.replay(batch)

    def _places(self, part: dict[str, Tensor]) -> CapturedPlaces:
        s = self._shape
        ends = [s.rows * (i + 1) for i in range(s.sequences)]
        table = part["table"].view(s.sequences, -1)
        slots, rows = part["slots"][:, None], s.sequences * s.rows
        group = Group(self._arena, 0, rows, slots, table, ends, [s.keys] * s.sequences, 0, s.trees)
        return CapturedPlaces(
            s,
            Places(part["positions"], 0, (group,)),
            torch.arange(s.keys, dtype=torch.int32, device=self._device.device) + int(s.trees),
            part["lengths"].view(s.sequences, 1),
            part["seen"].view(s.sequences, s.rows),
            part["unseen"].view(s.sequences, s.rows, s.rows + 2) if s.trees else None,
        )

    def replay(self, batch: Batch) -> Tensor:
        """Runs the pass over another batch of the same shape."""
        kept = self._send(batch)
        self._graph.replay()
        if kept == list(range(self._all_logits.shape[0])):
            self.logits = self._all_logits
        elif kept == list(range(kept[0], kept[-1] + 1)):
            self.logits = self._all_logits[kept[0] : kept[-1] + 1]
        else:
            self.logits = self._all_logits.index_select(0, self._kept[: len(kept)])
        return self.logits

    def _send(self, batch: Batch) -> list[int]:
        """Fills the device's buffer; returns the rows of the graph whose logits the batch keeps."""
        if not self._copied.query():
            self._copied.synchronize()  # the last batch has not left the host's buffer
        s, part = self._shape, self._part
        ids, positions, seen = ([0] * (s.sequences * s.rows) for _ in range(3))
        places = [SCRATCH * BLOCK + row % BLOCK for row in range(s.sequences * s.rows)]
        lengths, kept = [0] * s.sequences, []
        part["table"].zero_()
        table = part["table"].view(s.sequences, -1)
        for index, segment in enumerate(batch.segments):
            first, count, length = index * s.rows, len(segment.ids), segment.slot.length
            ids[first : first + count] = segment.ids
            positions[first : first + count] = [length + depth for depth in segment.depths()]
            seen[first : first + count] = range(length, length + count)
            places[first : first + count] = written(segment)
            lengths[index] = length
            own = segment.slot.blocks[: table.shape[1]]
            table[index, : len(own)] = torch.tensor(own, dtype=torch.int32)
            kept += range(first + count - segment.logits_to_keep, first + count)
        if s.trees:
            part["unseen"].copy_(self._unseen(batch).flatten())
        for name, values in (("ids", ids), ("positions", positions), ("seen", seen), ("lengths", lengths)):
            part[name].copy_(torch.tensor(values, dtype=torch.int32))
        part["slots"].copy_(scatter_rows(self._arena, places))
        part["kept"][: len(kept)] = torch.tensor(kept, dtype=torch.int32)
        self._device.copy_(self._host, non_blocking=True)
        self._copied.record()
        return kept

    def _unseen(self, batch: Batch) -> Tensor:
        """int32 [sequences, rows, 1 + rows + 1]: the committed text, the rows of the tree, what lies beyond it."""
        s = self._shape
        unseen = torch.ones(s.sequences, s.rows, s.rows + 2, dtype=torch.int32)
        unseen[:, :, 0] = 0
        for index, segment in enumerate(batch.segments):
            for row in range(len(segment.ids)):
                unseen[index, row, [1 + ancestor for ancestor in segment.path(row)]] = 0
            unseen[index, len(segment.ids) :, 1] = 0  # a row that sees nothing would give NaN, and write it
        unseen[len(batch.segments) :, :, 1] = 0
        return unseen


def captured(run: Callable[[], Tensor]) -> tuple[torch.npu.NPUGraph, Tensor]:
    """The graph of what `run` launches, and its result.

    After an operator that cannot be captured, `torch.npu.graph` fails to end the capture and leaves its own stream in
    use: whatever follows would be launched there and fail too. So the stream is put back here.
    """
    stream, graph = torch.npu.current_stream(), torch.npu.NPUGraph()
    try:
        with torch.npu.graph(graph):
            result = run()
    except BaseException as error:
        torch.npu.set_stream(stream)
        first = error.__context__  # what could not be captured, where ending the capture failed as well
        raise first if isinstance(first, Exception) else error from None
    return graph, result
