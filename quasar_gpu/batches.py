"""A batch as the kernels read it: one copy of integers from the host to the device, made for each pass.

`tables_of` says what each row and each program of attention has to do (kernels/attention.py); `Shape` is as much of it
as a captured pass depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quasar.backends.base import Batch, Segment
from quasar_gpu.kernels.attention import ITEM, NEVER, PAGE, SEGMENT, PassTables, split_end
from quasar_gpu.kernels.launch import MOST_ROWS
from quasar_gpu.slots import PagedSlot

ROW_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 32, 64)  # rows of captured passes; a batch runs in the next larger one
_MOST_PARTIALS = 8192  # partial sums of a row in one launch; longer prompts take several
_ROUND = 16  # numbers: each table begins at a multiple, which keeps addresses aligned
_PER_ROW = 6  # tables with a number for each row


@dataclass(frozen=True)
class Shape:
    """The sizes of a pass's tables, and of the workspace for partial sums."""

    rows: int
    items: int
    pages: int
    partials: int

    def bucket(self) -> Shape:
        """The captured pass that this one runs in: rows of ROW_BUCKETS, the rest powers of two."""
        rows = next(size for size in ROW_BUCKETS if size >= self.rows)
        return Shape(rows, _power(self.items, 8), _power(self.pages, 64), self.bucket_of_partials)

    @property
    def bucket_of_partials(self) -> int:
        """The workspace that a pass of this shape takes."""
        return _power(self.partials, 256)


@dataclass(frozen=True)
class Launched:
    """A stretch of attention: appending items if there are any, attending ones, and the rows that are then done."""

    items: range
    rows: range


@dataclass(frozen=True)
class HostTables:
    """What `tables_of` found, as lists; `shape` of exactly this batch."""

    shape: Shape
    per_row: list[list[int]]  # ids, positions, written_at, splits, partial_at, partial_step
    segments: list[int]
    items: list[list[int]]
    pages: list[int]
    ancestors: dict[int, list[int]]  # by row, of trees
    launched: list[Launched]

    def numbers(self, shape: Shape) -> list[int]:
        """All of it in the layout of `shape`, which may be larger; ancestors last and only if there are any."""
        flat: list[int] = []

        def add(values: Sequence[int], size: int) -> None:
            flat.extend(values)
            flat.extend([0] * (_rounded(size) - len(values)))

        for values in self.per_row:
            add(values, shape.rows)
        add(self.segments, shape.rows * SEGMENT)
        add([number for item in self.items for number in item], shape.items * ITEM)
        add(self.pages, shape.pages)
        if self.ancestors:
            for row in range(self.shape.rows):
                add(self.ancestors.get(row, ()), MOST_ROWS)
        return flat


def views(numbers: Tensor, shape: Shape) -> PassTables:
    """The tables that lie in `numbers`, int64 [size_of(shape)] on the device."""
    at = 0

    def take(size: int) -> Tensor:
        nonlocal at
        at += _rounded(size)
        return numbers[at - _rounded(size) :][:size]

    per_row = [take(shape.rows) for _ in range(_PER_ROW)]
    segments, items = take(shape.rows * SEGMENT).view(-1, SEGMENT), take(shape.items * ITEM).view(-1, ITEM)
    pages = take(shape.pages)
    return PassTables(*per_row, segments, items, pages, numbers[at:])


def size_of(shape: Shape) -> int:
    """Numbers in all tables of this shape."""
    flat = (shape.rows * SEGMENT, shape.items * ITEM, shape.pages)
    return _PER_ROW * _rounded(shape.rows) + sum(map(_rounded, flat)) + shape.rows * MOST_ROWS


def tables_of(batch: Batch, tile: int) -> HostTables:
    """What the kernels have to know of a batch. tile: rows that one program of attention takes.

    Batches of more than MOST_ROWS rows append first, then attend in stretches that bound the workspace.
    """
    made = _Maker(tile, append_first=batch.rows > MOST_ROWS)
    for segment in batch.segments:
        made.add(segment)
    return made.done()


class _Maker:
    """Adds segments one by one."""

    def __init__(self, tile: int, append_first: bool) -> None:
        self._tile, self._append_first = tile, append_first
        self._rows: list[list[int]] = [[] for _ in range(_PER_ROW)]
        self._segments: list[int] = []
        self._appending: list[list[int]] = []
        self._items: list[list[int]] = []
        self._pages: list[int] = []
        self._ancestors: dict[int, list[int]] = {}
        self._stretches: list[tuple[int, int]] = [(0, 0)]  # (items, rows) where each begins
        self._partials = self._most_partials = 0

    def add(self, segment: Segment) -> None:
        slot = segment.slot
        assert isinstance(slot, PagedSlot)
        length, first, count = slot.length, len(self._rows[0]), len(segment.ids)
        slot.own(length, length + count)
        tree = segment.parents is not None and any(p != row - 1 for row, p in enumerate(segment.parents))
        written = [slot.address(length + row) for row in range(count)]
        positions = [length + depth for depth in segment.depths()]
        index = len(self._segments) // SEGMENT
        self._segments += [length, len(self._pages), length if tree else NEVER, 0]
        self._pages += [page.at for page in slot.pages[: -(-(length + count) // PAGE)]]
        for values, more in zip(self._rows, (segment.ids, positions, written), strict=False):
            values += more
        if tree:
            if count > MOST_ROWS:
                raise ValueError(f"a draft tree of {count} rows: at most {MOST_ROWS}")
            for row in range(count):
                self._ancestors[first + row] = [written[ancestor] for ancestor in segment.path(row)]
        if self._append_first:
            for begin in range(0, count, 16):
                last = first + min(begin + 16, count)
                self._appending.append([0, 0, 0, 0, first + begin, last, index, 0])
        for begin in range(0, count, self._tile):
            rows = range(begin, min(begin + self._tile, count))
            (self._add_branches if tree else self._add_tile)(rows, first, length, positions, index)

    def _add_tile(self, rows: range, first: int, length: int, positions: list[int], segment: int) -> None:
        """Rows of a chain, together."""
        end = length + rows.stop
        splits = _splits(end)
        base = self._partials_for(len(splits) * len(rows), first + rows.start)
        for i, (begin, stop) in enumerate(splits):
            stop = min(stop, end)
            appended = (max(begin - length, 0), max(stop - length, 0))
            if self._append_first or appended[0] >= appended[1]:
                appended = (-first, -first)
            here = [first + rows.start, len(rows), begin, stop]
            self._items.append([*here, first + appended[0], first + appended[1], segment, base + i * len(rows)])
        self._note(rows, positions, base)

    def _add_branches(self, rows: range, first: int, length: int, positions: list[int], segment: int) -> None:
        """Rows of a tree: together as far as the committed text fills a split, then each along its own path."""
        splits = _splits(max(positions[row] for row in rows) + 1)
        base = self._partials_for(len(splits) * len(rows), first + rows.start)
        for i, (begin, stop) in enumerate(splits):
            if stop <= length:
                item = [first + rows.start, len(rows), begin, stop, 0, 0, segment, base + i * len(rows)]
                self._items.append(item)
                continue
            for j, row in enumerate(rows):
                if begin > positions[row]:
                    continue
                appended = [0, 0] if self._append_first else [first, first + row + 1]
                here = [first + row, 1, begin, min(stop, positions[row] + 1)]
                self._items.append([*here, *appended, segment, base + i * len(rows) + j])
        self._note(rows, positions, base)

    def _partials_for(self, count: int, row: int) -> int:
        """Room for so many partial sums of the rows from `row` on; where it is full, a new stretch begins."""
        if self._append_first and self._partials and self._partials + count > _MOST_PARTIALS:
            self._stretches.append((len(self._items), row))
            self._partials = 0
        base = self._partials
        self._partials += count
        self._most_partials = max(self._most_partials, self._partials)
        return base

    def _note(self, rows: range, positions: list[int], base: int) -> None:
        _, _, _, splits, partial_at, partial_step = self._rows
        for i, row in enumerate(rows):
            splits.append(len(_splits(positions[row] + 1)))
            partial_at.append(base + i)
            partial_step.append(len(rows))

    def done(self) -> HostTables:
        rows, appending = len(self._rows[0]), len(self._appending)
        stretches = [*self._stretches, (len(self._items), rows)]
        launched = [Launched(range(appending), range(0))] if appending else []
        launched += [
            Launched(range(appending + a, appending + b), range(r, s)) for (a, r), (b, s) in pairwise(stretches)
        ]
        items = self._appending + self._items
        shape = Shape(rows, len(items), len(self._pages), self._most_partials)
        return HostTables(shape, self._rows, self._segments, items, self._pages, self._ancestors, launched)


def _splits(end: int) -> list[tuple[int, int]]:
    """The stretches of positions 0 .. end - 1 that attention is split into; the last may reach beyond."""
    found, begin = [], 0
    while begin < end:
        found.append((begin, split_end(begin)))
        begin = split_end(begin)
    return found


def _rounded(size: int) -> int:
    return -(-size // _ROUND) * _ROUND


def _power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


class PassInputs:
    """The tables of a pass in device memory. Those of a captured pass stay where they are, and are written anew."""

    def __init__(self, shape: Shape, device: torch.device, workspace: Tensor) -> None:
        """workspace: for the partial sums of attention."""
        with torch.inference_mode(False):
            self._fill(shape, torch.zeros(size_of(shape), dtype=torch.int64, device=device), workspace)
        self.launched = [Launched(range(shape.items), range(shape.rows))]

    def _fill(self, shape: Shape, numbers: Tensor, workspace: Tensor) -> None:
        self.shape, self.workspace = shape, workspace
        self._numbers, self.tables = numbers, views(numbers, shape)

    @classmethod
    def of(cls, host: HostTables, device: torch.device, workspace: Tensor) -> PassInputs:
        """For one pass alone."""
        made = cls.__new__(cls)
        made._fill(host.shape, torch.tensor(host.numbers(host.shape), dtype=torch.int64, device=device), workspace)
        made.launched = host.launched
        return made

    def write(self, host: HostTables) -> None:
        """In one copy that the host does not wait for."""
        # Pinned memory comes from torch's own pool, which hands it out again only once the copy is done.
        numbers = torch.tensor(host.numbers(self.shape), dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)
