"""Attention of a batch over paged keys and values: rope, append and the splits of keys in one kernel, then their sum.

A card is filled by splitting the keys: each program attends to a stretch of positions of one kv head for up to 16 rows
of a sequence, and leaves a partial sum that a second kernel combines. Splits begin at fixed positions, whatever the
batch (`split_end`), and are combined one after the other: a row's result is the same in every batch.

What a program does is an item, made on the host for each pass (quasar_gpu/batches.py) and read from the device, so that
a captured pass serves every batch of its size. An item has

    row, rows       the rows that it attends for; none: it appends only, or is there to fill the grid
    begin, end      the positions that it attends to: of the committed text, then of each row's own path
    first, last     rows whose keys and values it makes from qkv and appends, before it attends
    segment         of `segments`
    partial         where its first row's partial sum goes

Several programs may append one row: they write the same bits. A program reads appended rows only if it appended them
itself, or an earlier launch did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar.backends.base import AttentionSpec
from quasar_gpu.kernels.launch import MOST_ROWS, WINDOW, as_peak, await_inputs, jit, launch

PAGE = 128  # positions
UNIT = 8  # elements: what addresses are counted in, so that the compiler knows how they are aligned
ITEM = 8  # numbers of an item
SEGMENT = 4  # numbers of a segment: committed positions, first of its `pages`, where paths begin (NEVER), one unused
NEVER = 1 << 30  # for a chain: a position that none has
_APPENDED = 16  # rows that are appended together
_HEADS = 4  # of a row that one program combines
_UNROLLED = 8  # partial sums whose loads are under way together


def split_end(begin: int) -> int:
    """Where the split that begins at a position ends: longer ones later, or partial sums would outweigh the keys."""
    return begin + (PAGE if begin < 2048 else 4 * PAGE if begin < 16384 else 8 * PAGE)


def tile_rows(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Rows of a sequence that one program attends for; never depends on how many there are."""
    group = triton.next_power_of_2(spec.heads // spec.kv_heads)
    most = 16 if dtype == torch.float32 else 64  # rows by heads: no tensor cores for float32, but registers
    return max(1, min(WINDOW, most // group))


@dataclass(frozen=True)
class PassTables:
    """Views of what a pass reads from the device, int64; see quasar_gpu/batches.py."""

    ids: Tensor  # [rows]
    positions: Tensor  # [rows] by which rows are rotated
    written_at: Tensor  # [rows] where keys and values go, in UNITs from the pool's first page
    splits: Tensor  # [rows] splits that a row sees anything of; 0 for a row that only fills the batch
    partial_at: Tensor  # [rows] its partial sum of the first split
    partial_step: Tensor  # [rows] from there to that of the next
    segments: Tensor  # [segments, SEGMENT]
    items: Tensor  # [items, ITEM]
    pages: Tensor  # where each segment's pages begin, in UNITs from the pool's first page
    ancestors: Tensor  # [rows, MOST_ROWS] of rows of trees: `written_at` of the ancestor at each depth, itself last


def partial_floats(partials: int, heads: int, head_dim: int) -> int:
    """Size of the float32 workspace for so many partial sums of a row."""
    return partials * heads * (head_dim + 2)


def attend_items(
    qkv: Tensor,
    spec: AttentionSpec,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: PassTables,
    items: Tensor,
    workspace: Tensor,
    peaks: Tensor | None = None,
) -> None:
    """Norms q and k per head where there are norms, rotates them ("half" layout), appends k and v, and attends.

    qkv [rows, (heads + 2 * kv_heads) * head_dim]; cos, sin float32 [positions, head_dim / 2], whole tables; k_pages,
    v_pages [kv_heads, PAGE, head_dim], this layer's in the pool's first page; items: of `tables`; workspace: see
    `partial_floats`; peaks int32 [MOST_ROWS]: made ready for `combine`. Scores, softmax and sums are float32 (the
    reference rounds 16-bit scores); weights are rounded to the cache's type before they meet the values. Norm as in the
    reference but for the order of the mean's sum; the rotation is bit for bit the same.
    """
    heads, kv_heads, head_dim = spec.heads, spec.kv_heads, spec.head_dim
    group = heads // kv_heads
    narrow = qkv.element_size() == 4
    padded = triton.next_power_of_2(group)
    tile = max(tile_rows(spec, qkv.dtype) * padded, 16)
    normed = spec.q_norm is not None and spec.k_norm is not None
    launch(
        _attend_items,
        (kv_heads, len(items)),
        *(qkv, cos, sin, spec.q_norm if normed else qkv, spec.k_norm if normed else qkv, spec.eps, k_pages, v_pages),
        *(tables.positions, tables.written_at, tables.ancestors, tables.segments, items, tables.pages),
        *(workspace, workspace if peaks is None else peaks, head_dim**-0.5 / math.log(2)),
        *(heads, kv_heads, head_dim, group, workspace.numel() // (heads * (head_dim + 2))),
        warps=8,
        stages=2,
        NORMED=normed,
        HAS_PEAKS=peaks is not None,
        TILE=tile,
        GROUP=padded,
        HALF=max(triton.next_power_of_2(head_dim // 2), 16),
        WIDTH=max(triton.next_power_of_2(head_dim), 16),
        PAGE=PAGE,
        BLOCK=16 if narrow else 64,
        APPENDED=_APPENDED,
        UNIT=UNIT,
        ITEM=ITEM,
        SEGMENT=SEGMENT,
        MOST_ROWS=MOST_ROWS,
    )


def combine(
    spec: AttentionSpec, tables: PassTables, rows: range, workspace: Tensor, out: Tensor, peaks: Tensor | None = None
) -> None:
    """Adds the partial sums of `rows` up: out [len(rows), heads * head_dim].

    peaks int32 [rows], as `attend_items` left it: max|out| of each row as `launch.as_peak` has it.
    """
    heads, head_dim = spec.heads, spec.head_dim
    here = slice(rows.start, rows.stop)
    launch(
        _combine_splits,
        (len(rows), triton.cdiv(heads, _HEADS)),
        *(workspace, tables.splits[here], tables.partial_at[here], tables.partial_step[here], out),
        *(out if peaks is None else peaks, heads, head_dim, workspace.numel() // (heads * (head_dim + 2))),
        warps=4,
        HAS_PEAKS=peaks is not None,
        HEADS=_HEADS,
        WIDTH=triton.next_power_of_2(head_dim),
        UNROLLED=_UNROLLED,
    )


def move_rows(pages: Tensor, moves: Tensor, head_dim: int) -> None:
    """Copies keys and values of some positions to others, all layers and heads.

    pages [layers, 2, kv_heads, PAGE, head_dim]: the pool's first; moves int64 [2, n], n at most MOST_ROWS: from and
    to, in UNITs from there. All are read before any is written.
    """
    vectors = pages.numel() // (PAGE * head_dim)
    count = triton.next_power_of_2(moves.shape[1])
    width = triton.next_power_of_2(head_dim)
    launch(
        _move_rows,
        (vectors,),
        *(pages, moves, moves.shape[1], head_dim),
        warps=4,
        COUNT=count,
        WIDTH=width,
        PAGE=PAGE,
        UNIT=UNIT,
    )


@triton.jit
def _normed_rotated(
    source, norm, cos, sin, position, there, eps, head_dim, dtype: tl.constexpr,
    NORMED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of the heads that begin at `source` [n], float32 [n, HALF] each, rounded to `dtype`."""
    half = head_dim // 2
    column = tl.arange(0, HALF)
    mask = there[:, None] & (column < half)[None, :]
    a = tl.load(source[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(source[:, None] + half + column[None, :], mask=mask, other=0).to(tl.float32)
    angle = position[:, None] * half + column[None, :]
    c = tl.load(cos + angle, mask=mask, other=0)
    s = tl.load(sin + angle, mask=mask, other=0)
    if NORMED:
        mean = tl.div_rn(tl.sum(a * a + b * b, axis=1), head_dim.to(tl.float32))
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        gain_a = tl.load(norm + column, mask=column < half, other=0).to(tl.float32)
        gain_b = tl.load(norm + half + column, mask=column < half, other=0).to(tl.float32)
        a = (a * inverse * gain_a[None, :]).to(dtype).to(tl.float32)
        b = (b * inverse * gain_b[None, :]).to(dtype).to(tl.float32)
    return (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)


@jit(varying=("eps", "capacity"))
def _attend_items(
    qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, positions, written_at, ancestors, segments, items, pages,
    workspace, peaks, scale, heads, kv_heads, head_dim, group, capacity,
    NORMED: tl.constexpr, HAS_PEAKS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, APPENDED: tl.constexpr, UNIT: tl.constexpr,
    ITEM: tl.constexpr, SEGMENT: tl.constexpr, MOST_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """scale is that of base-2 exponents; the workspace holds `capacity` partial sums."""
    kv_head = tl.program_id(0)
    item = items + tl.program_id(1) * ITEM
    half = head_dim // 2
    column, halves = tl.arange(0, WIDTH), tl.arange(0, HALF)
    width = (heads + 2 * kv_heads) * head_dim
    of_head = kv_head * PAGE * head_dim  # within a page
    dtype: tl.constexpr = qkv.dtype.element_ty
    await_inputs(DEPENDENT)
    if HAS_PEAKS:  # noqa: SIM102  known when the kernel is compiled
        if (kv_head == 0) & (tl.program_id(1) == 0):
            tl.store(peaks + tl.arange(0, MOST_ROWS), tl.zeros((MOST_ROWS,), tl.int32))
    row, rows = tl.load(item).to(tl.int32), tl.load(item + 1).to(tl.int32)
    begin, end = tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32)
    first, last = tl.load(item + 4).to(tl.int32), tl.load(item + 5).to(tl.int32)
    segment, partial = segments + tl.load(item + 6) * SEGMENT, tl.load(item + 7).to(tl.int32)
    if first < last:
        for start in range(first, last, APPENDED):
            r = start + tl.arange(0, APPENDED)
            there = r < last
            position = tl.load(positions + r, mask=there, other=0)
            source = qkv + r.to(tl.int64) * width + (heads + kv_head) * head_dim
            a, b = _normed_rotated(source, k_norm, cos, sin, position, there, eps, head_dim, dtype, NORMED, HALF)
            place = (tl.load(written_at + r, mask=there, other=0) * UNIT + of_head)[:, None]
            inside = there[:, None] & (halves < half)[None, :]
            tl.store(k_pages + place + halves[None, :], a, mask=inside)
            tl.store(k_pages + place + half + halves[None, :], b, mask=inside)
            inside = there[:, None] & (column < head_dim)[None, :]
            value = tl.load((source + kv_heads * head_dim)[:, None] + column[None, :], mask=inside, other=0)
            tl.store(v_pages + place + column[None, :], value, mask=inside)
        tl.debug_barrier()  # this program's threads see each other's rows
    if rows > 0:
        committed, page_at = tl.load(segment).to(tl.int32), tl.load(segment + 1)
        branches = tl.load(segment + 2).to(tl.int32)
        tile, key = tl.arange(0, TILE), tl.arange(0, BLOCK)
        real = (tile // GROUP < rows) & (tile % GROUP < group)
        mine = row + tile // GROUP
        head = kv_head * group + tile % GROUP
        position = tl.load(positions + mine, mask=real, other=0).to(tl.int32)
        source = qkv + mine.to(tl.int64) * width + head * head_dim
        qa, qb = _normed_rotated(source, q_norm, cos, sin, position, real, eps, head_dim, dtype, NORMED, HALF)
        peak = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        sums = tl.zeros((TILE, WIDTH), tl.float32)
        for block in range(begin, end, BLOCK):
            at = block + key
            there = at < end
            page = tl.load(pages + page_at + block // PAGE) * UNIT
            place = page + (block % PAGE + key) * head_dim
            # A tree's row has its path's keys where a chain would have the last ones.
            branch = there & (at >= branches)
            path = tl.load(ancestors + row * MOST_ROWS + (at - committed), mask=branch, other=0) * UNIT
            place = (tl.where(branch, path, place) + of_head)[:, None]
            inside = there[:, None] & (halves < half)[None, :]
            ka = tl.load(k_pages + place + halves[None, :], mask=inside, other=0)
            kb = tl.load(k_pages + place + half + halves[None, :], mask=inside, other=0)
            scores = tl.dot(qa, tl.trans(ka), input_precision="ieee")
            scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee") * scale
            seen = (at[None, :] <= position[:, None]) & there[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            # A row that sees nothing of this split keeps a peak of -inf; 0 in its place makes its weights 0, not NaN.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(peak - shift)
            total = total * fade + tl.sum(weights, axis=1)
            inside = there[:, None] & (column < head_dim)[None, :]
            values = tl.load(v_pages + place + column[None, :], mask=inside, other=0)
            sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            peak = higher
        # Layout: sums [capacity, heads, head_dim], then peaks and totals [capacity, heads].
        here = (partial + tile // GROUP) * heads + head
        out_at = here[:, None] * head_dim + column[None, :]
        tl.store(workspace + out_at, sums, mask=real[:, None] & (column < head_dim)[None, :])
        tl.store(workspace + capacity * heads * head_dim + here, peak, mask=real)
        tl.store(workspace + capacity * heads * (head_dim + 1) + here, total, mask=real)


@jit(varying=("capacity",))
def _combine_splits(
    workspace, splits, partial_at, partial_step, out, peaks, heads, head_dim, capacity,
    HAS_PEAKS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, UNROLLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A row's block of heads: splits weighted by their peaks, in order."""
    row = tl.program_id(0)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    real = head < heads
    inside = real[:, None] & (column < head_dim)[None, :]
    await_inputs(DEPENDENT)
    count = tl.load(splits + row).to(tl.int32)
    first, step = tl.load(partial_at + row).to(tl.int32), tl.load(partial_step + row).to(tl.int32)
    used = tl.where(real, count, 0)
    split_peaks = workspace + capacity * heads * head_dim
    totals = split_peaks + capacity * heads
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    for base in range(0, count, UNROLLED):
        for i in tl.static_range(UNROLLED):
            here = (first + (base + i) * step) * heads + head
            highest = tl.maximum(highest, tl.load(split_peaks + here, mask=base + i < used, other=float("-inf")))
    seen = highest != float("-inf")
    highest = tl.where(seen, highest, 0.0)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, WIDTH), tl.float32)
    for base in range(0, count, UNROLLED):
        for i in tl.static_range(UNROLLED):
            there = base + i < used
            here = (first + (base + i) * step) * heads + head
            weight = tl.exp2(tl.load(split_peaks + here, mask=there, other=float("-inf")) - highest)
            total += weight * tl.load(totals + here, mask=there, other=0)
            at = workspace + here[:, None] * head_dim + column[None, :]
            sums += weight[:, None] * tl.load(at, mask=there[:, None] & inside, other=0)
    y = tl.div_rn(sums, tl.where(seen, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * heads + head)[:, None] * head_dim + column[None, :], y, mask=inside)
    if HAS_PEAKS:
        peak = tl.max(tl.max(tl.where(inside, as_peak(y.to(tl.float32)), 0), axis=1), axis=0)
        tl.atomic_max(peaks + row, peak, sem="relaxed")


@jit(varying=("count",))
def _move_rows(
    pages, moves, count, head_dim,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    n, column = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    of_head = tl.program_id(0).to(tl.int64) * PAGE * head_dim
    await_inputs(DEPENDENT)
    source = tl.load(moves + n, mask=n < count, other=0) * UNIT + of_head
    target = tl.load(moves + count + n, mask=n < count, other=0) * UNIT + of_head
    inside = (n < count)[:, None] & (column < head_dim)[None, :]
    x = tl.load(pages + source[:, None] + column[None, :], mask=inside, other=0)
    tl.debug_barrier()
    tl.store(pages + target[:, None] + column[None, :], x, mask=inside)
