"""Attention of a window over the KV cache: rope and append in one kernel, then the keys in splits, then their sum.

At batch 1 a card is filled by splitting the keys: each program attends to 128 positions of one kv head for all the
window's rows, and leaves a partial sum in a workspace that a second kernel combines. Splits begin at fixed
positions, whatever the window's length and `reach`, and are combined one after the other: a row's result is the same in
every window.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from quasar_gpu.kernels.launch import WINDOW, await_inputs, check_window, jit, launch, round_to_int8, row_scale_of
from quasar_gpu.kernels.rows import quantize

SPLIT = 128  # keys of a partial sum
_FUSED_REACH = 2048  # beyond, one program per row would take longer to combine than a launch does
_UNROLLED = 8  # partial sums whose loads are under way together


def append_rotated(
    qkv: Tensor,
    start: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    q_out: Tensor,
) -> None:
    """Norms q and k per head where there are norms, rotates them ("half" layout), and writes k and v to the cache.

    qkv [rows, (heads + 2 * kv_heads) * head_dim]; start int64 [1]: row i is at position start[0] + i; cos, sin float32
    [positions, head_dim / 2], whole tables; q_norm, k_norm [head_dim] or both None; k_cache, v_cache [kv_heads,
    capacity, head_dim]; q_out [rows, heads, head_dim]. Rows beyond the capacity are dropped. Norm as in the
    reference but for the order of the mean's sum; the rotation and, without norms, everything is bit for bit the same.
    """
    rows, heads, head_dim = q_out.shape
    kv_heads, capacity, _ = k_cache.shape
    launch(
        _append_rotated,
        (rows, heads + 2 * kv_heads),
        *(qkv, start, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps),
        *(k_cache, v_cache, q_out, heads, kv_heads, head_dim, capacity),
        warps=1,
        NORMED=q_norm is not None,
        HALF=triton.next_power_of_2(head_dim // 2),
    )


def attention_partials_shape(rows: int, heads: int, head_dim: int, reach: int) -> tuple[int]:
    """Shape of the float32 workspace that window_attention wants for this window; a larger one will do as well."""
    return (triton.cdiv(reach, SPLIT) * rows * heads * (head_dim + 2),)


def window_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, scale: float, out: Tensor, partials: Tensor, reach: int
) -> None:
    """Causal attention: row i sees positions 0 .. start[0] + i.

    q [rows, heads, head_dim]; k_cache, v_cache [kv_heads, capacity, head_dim], the window's own rows appended already;
    start int64 [1] on the device; out [rows, heads * head_dim]; partials float32, see attention_partials_shape; reach:
    at least start[0] + rows, fixes the grid (programs beyond the window's end leave at once) and changes no result.
    Scores, softmax and sums are float32 (the reference rounds 16-bit scores), weights are rounded to the
    cache's type before they meet the values. Raises QuasarError for more than 16 rows.
    """
    _attend(q, k_cache, v_cache, start, scale, partials, reach)
    _combine(q, start, partials, reach, heads_together=1, out=out, scale=out)


def window_attention_quantize(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    scale: float,
    out: Tensor,
    partials: Tensor,
    reach: int,
    values: Tensor,
    values_scale: Tensor,
) -> None:
    """window_attention, quantised: values int8 [rows, heads * head_dim], values_scale float32 [rows].

    Up to a reach of 2048 the combining kernel quantises and `out` is left alone; beyond, `out` is written too and a
    third kernel quantises it. The numbers are the same.
    """
    if reach > _FUSED_REACH:
        window_attention(q, k_cache, v_cache, start, scale, out, partials, reach)
        quantize(out, values, values_scale)
        return
    _attend(q, k_cache, v_cache, start, scale, partials, reach)
    heads = triton.next_power_of_2(q.shape[1])
    _combine(q, start, partials, reach, heads_together=heads, out=values, scale=values_scale)


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, scale: float, partials: Tensor, reach: int
) -> None:
    rows, heads, head_dim = q.shape
    check_window(rows)
    kv_heads, capacity, _ = k_cache.shape
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    narrow = q.element_size() == 4  # no tensor cores for float32: tiles that fit the registers
    tile = max(1, min(WINDOW, (16 if narrow else 128) // padded))  # window rows a program; never depends on `rows`
    launch(
        _attend_split,
        (kv_heads, triton.cdiv(reach, SPLIT), triton.cdiv(rows, tile)),
        *(q, k_cache, v_cache, start, partials, scale / math.log(2)),
        *(rows, heads, head_dim, group, capacity),
        warps=8 if tile * padded > 64 else 4,
        stages=2,
        TILE=max(tile * padded, 16),
        GROUP=padded,
        WIDTH=max(triton.next_power_of_2(head_dim), 16),
        SPLIT=SPLIT,
        BLOCK=16 if narrow else 64,
    )


def _combine(
    q: Tensor,
    start: Tensor,
    partials: Tensor,
    reach: int,
    heads_together: int,
    out: Tensor,
    scale: Tensor,
) -> None:
    rows, heads, head_dim = q.shape
    width = triton.next_power_of_2(head_dim)
    launch(
        _combine_splits,
        (rows, triton.cdiv(heads, heads_together)),
        *(partials, start, out, scale, q, rows, heads, head_dim, triton.cdiv(reach, SPLIT)),
        warps=max(1, min(16, heads_together * width // 256)),
        QUANTIZE=out is not scale,
        HEADS=heads_together,
        WIDTH=width,
        SPLIT=SPLIT,
        UNROLLED=_UNROLLED,
    )


@jit(varying=("eps",))
def _append_rotated(
    qkv, start, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, q_out, heads, kv_heads, head_dim, capacity,
    NORMED: tl.constexpr, HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    half = head_dim // 2
    column = tl.arange(0, HALF)
    inside = column < half
    dtype = qkv.dtype.element_ty
    await_inputs(DEPENDENT)
    position = tl.load(start) + row
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    a = tl.load(source + column, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + half + column, mask=inside, other=0).to(tl.float32)
    fits = position < tl.where(inside, capacity, 0)  # rows beyond the capacity have no place to go
    if head < heads + kv_heads:
        if NORMED:
            norm = q_norm if head < heads else k_norm
            mean = tl.div_rn(tl.sum(a * a + b * b, axis=0), head_dim.to(tl.float32))
            inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
            gain_a = tl.load(norm + column, mask=inside, other=0).to(tl.float32)
            gain_b = tl.load(norm + half + column, mask=inside, other=0).to(tl.float32)
            a = (a * inverse * gain_a).to(dtype).to(tl.float32)
            b = (b * inverse * gain_b).to(dtype).to(tl.float32)
        c = tl.load(cos + position * half + column, mask=fits, other=0)
        s = tl.load(sin + position * half + column, mask=fits, other=0)
        a, b = a * c - b * s, b * c + a * s
    if head < heads:
        rotated = q_out + (row * heads + head) * head_dim + column
        tl.store(rotated, a.to(dtype), mask=inside)
        tl.store(rotated + half, b.to(dtype), mask=inside)
    else:
        cache = k_cache if head < heads + kv_heads else v_cache
        appended = cache + ((head - heads) % kv_heads * capacity + position) * head_dim + column
        tl.store(appended, a.to(dtype), mask=fits)
        tl.store(appended + half, b.to(dtype), mask=fits)


@jit(varying=("rows",))
def _attend_split(
    q, k_cache, v_cache, start, partials, scale, rows, heads, head_dim, group, capacity,
    TILE: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of one kv head: TILE / GROUP window rows by `group` query heads; scale is that of base-2 exponents."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    tile, column, key = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    row = tl.program_id(2) * (TILE // GROUP) + tile // GROUP
    await_inputs(DEPENDENT)
    first = tl.load(start)
    end = first + rows
    begin = split * SPLIT
    if begin < end:
        real = (row < rows) & (tile % GROUP < group)
        head = kv_head * group + tile % GROUP
        wide = column < head_dim
        at = (row * heads + head)[:, None] * head_dim + column[None, :]
        queries = tl.load(q + at, mask=real[:, None] & wide[None, :], other=0)
        base = kv_head.to(tl.int64) * capacity * head_dim
        peak = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        sums = tl.zeros((TILE, WIDTH), tl.float32)
        for block in range(begin, tl.minimum(begin + SPLIT, end), BLOCK):
            position = block + key
            there = position < end
            cached = base + position[:, None] * head_dim + column[None, :]
            keys = tl.load(k_cache + cached, mask=there[:, None] & wide[None, :], other=0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(position[None, :] <= (first + row)[:, None], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            # A row that sees nothing of this split keeps a peak of -inf; 0 in its place makes its weights 0, not NaN.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(peak - shift)
            total = total * fade + tl.sum(weights, axis=1)
            values = tl.load(v_cache + cached, mask=there[:, None] & wide[None, :], other=0)
            sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            peak = higher
        # Layout: sums [splits, rows, heads, head_dim], then peaks and totals [splits, rows, heads].
        count = tl.num_programs(1) * rows * heads
        here = (split * rows + row) * heads + head
        tl.store(partials + here[:, None] * head_dim + column[None, :], sums, mask=real[:, None] & wide[None, :])
        tl.store(partials + count * head_dim + here, peak, mask=real)
        tl.store(partials + count * (head_dim + 1) + here, total, mask=real)


@jit(varying=("rows", "reserved"))
def _combine_splits(
    partials, start, out, scale, q, rows, heads, head_dim, reserved,
    QUANTIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, UNROLLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A row's block of heads: splits weighted by their peaks, in order; the workspace holds `reserved` of them."""
    row = tl.program_id(0)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    real = head < heads
    inside = real[:, None] & (column < head_dim)[None, :]
    await_inputs(DEPENDENT)
    splits = (tl.load(start).to(tl.int32) + row) // SPLIT + 1  # those that the row sees anything of
    used = tl.where(real, splits, 0)
    peaks = partials + reserved * rows * heads * head_dim
    totals = peaks + reserved * rows * heads
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    for base in range(0, splits, UNROLLED):
        for i in tl.static_range(UNROLLED):
            there = base + i < used
            here = ((base + i) * rows + row) * heads + head
            highest = tl.maximum(highest, tl.load(peaks + here, mask=there, other=float("-inf")))
    highest = tl.where(real, highest, 0.0)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, WIDTH), tl.float32)
    for base in range(0, splits, UNROLLED):
        for i in tl.static_range(UNROLLED):
            there = base + i < used
            here = ((base + i) * rows + row) * heads + head
            weight = tl.exp2(tl.load(peaks + here, mask=there, other=float("-inf")) - highest)
            total += weight * tl.load(totals + here, mask=there, other=0)
            at = partials + here[:, None] * head_dim + column[None, :]
            sums += weight[:, None] * tl.load(at, mask=there[:, None] & inside, other=0)
    y = tl.div_rn(sums, tl.where(real, total, 1.0)[:, None]).to(q.dtype.element_ty)
    at = (row * heads + head)[:, None] * head_dim + column[None, :]
    if QUANTIZE:
        y = y.to(tl.float32)
        peak = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
        row_scale = row_scale_of(peak, 127)
        tl.store(out + at, round_to_int8(tl.div_rn(y, row_scale)), mask=inside)
        tl.store(scale + row, row_scale)
    else:
        tl.store(out + at, y, mask=inside)
