"""Where the rows of a pass go and what they see, as the operators want it: computed on the host, one copy a pass.

The rows of a layer's q, k and v are put in this order before they are rotated: q [rows, heads], k [rows, kv_heads],
v [rows, kv_heads]. So one rotation serves all of them, q is what attention takes (tokens outermost), and k and v leave
the rotation side by side for one scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import Batch, Segment
from quasar_npu.arena import BLOCK, Arena, NpuSlot


@dataclass(frozen=True)
class Group:
    """Consecutive segments whose slots lie in one arena: usually all of a pass.

    slots int32 [2 * rows * kv_heads, 1]: rows of `Arena.rows`, keys' then values'.
    block_table int32 [segments, blocks].
    """

    arena: Arena
    first_row: int
    last_row: int
    slots: Tensor
    block_table: Tensor
    row_ends: list[int]  # of each segment, counted from the group's first row
    lengths: list[int]  # of each sequence, this pass's rows included
    first_segment: int  # of the batch's
    trees: bool  # whether any of its segments is one


@dataclass(frozen=True)
class Places:
    """positions int32 [rows] on the device; None for one chain, whose rotations lie in a row from `start` on."""

    positions: Tensor | None
    start: int
    groups: tuple[Group, ...]


def eager_places(batch: Batch, device: torch.device) -> Places:
    """For a pass that is launched operator by operator."""
    groups = _grouped(batch)
    parts: list[Tensor] = []
    chain = len(batch.segments) == 1 and batch.segments[0].parents is None
    if not chain:
        parts.append(torch.tensor(batch.positions, dtype=torch.int32))
    tables = []
    for segments in groups:
        arena = segments[0].slot.arena
        places = [place for segment in segments for place in written(segment)]
        parts.append(scatter_rows(arena, places))
        blocks = max(-(-(segment.slot.length + len(segment.ids)) // BLOCK) for segment in segments)
        tables.append(block_table(segments, blocks))
        parts.append(tables[-1].flatten())
    on_device = iter(_one_copy(parts, device))
    positions = None if chain else next(on_device)
    made: list[Group] = []
    first = first_segment = 0
    for segments, table in zip(groups, tables, strict=True):
        ends = _ends(segments)
        slots, blocks = next(on_device)[:, None], next(on_device).view(table.shape)
        lengths = [segment.slot.length + len(segment.ids) for segment in segments]
        arena, trees = segments[0].slot.arena, any(segment.parents is not None for segment in segments)
        made.append(Group(arena, first, first + ends[-1], slots, blocks, ends, lengths, first_segment, trees))
        first, first_segment = first + ends[-1], first_segment + len(segments)
    return Places(positions, batch.segments[0].slot.length, tuple(made))


def written(segment: Segment) -> list[int]:
    """Where in the arena the segment's rows are written."""
    slot = segment.slot
    assert isinstance(slot, NpuSlot)
    return slot.places(range(slot.length, slot.length + len(segment.ids)))


def scatter_rows(arena: Arena, places: Sequence[int]) -> Tensor:
    """int32 [2 * places * kv_heads]: the rows of `Arena.rows` for positions of the arena, keys' then values'."""
    heads = torch.arange(arena.kv_heads, dtype=torch.int32)
    keys = (torch.tensor(places, dtype=torch.int32)[:, None] * arena.kv_heads + heads).flatten()
    return torch.cat([keys, keys + arena.values_from])


def block_table(segments: Sequence[Segment], blocks: int) -> Tensor:
    """int32 [segments, blocks]; the scratch block where a sequence has no more."""
    table = torch.zeros(len(segments), blocks, dtype=torch.int32)
    for row, segment in enumerate(segments):
        assert isinstance(segment.slot, NpuSlot)
        own = segment.slot.blocks[:blocks]
        table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
    return table


def hidden_from(segment: Segment, columns: int) -> Tensor:
    """bool [rows, columns] of one sequence, on the host: True where a row of its tree must not look."""
    length, rows = segment.slot.length, len(segment.ids)
    hidden = torch.ones(rows, columns, dtype=torch.bool)
    hidden[:, :length] = False
    for row in range(rows):
        hidden[row, [length + ancestor for ancestor in segment.path(row)]] = False
    return hidden


def row_order(rows: int, *heads: int) -> Tensor:
    """int32 [rows * sum(heads)]: the rows of [rows, sum(heads), head_dim], those of the first heads first.

    heads: those of q, k and v, or of q and k.
    """
    of_row = torch.arange(rows * sum(heads), dtype=torch.int32).view(rows, -1)
    return torch.cat([part.flatten() for part in of_row.split(heads, dim=1)])


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True)


def _one_copy(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    return to_device(torch.cat([part.flatten() for part in parts]), device).split([part.numel() for part in parts])


def _grouped(batch: Batch) -> list[list[Segment]]:
    groups: list[list[Segment]] = []
    for segment in batch.segments:
        if groups and groups[-1][0].slot.arena is segment.slot.arena:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _ends(segments: Sequence[Segment]) -> list[int]:
    ends: list[int] = []
    for segment in segments:
        ends.append((ends[-1] if ends else 0) + len(segment.ids))
    return ends
