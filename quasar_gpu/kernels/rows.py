"""Kernels between the matmuls: embedding, residual-add + RMSNorm, SwiGLU, quantisation.

A window has few rows, so these are bound by latency, not by bytes (Qwen3-8B: 8 KB a row). A norm needs its whole row at
once: one program reads it, keeps it in registers and writes what the next matmul wants. Where a row's peak is known
already, several programs quantise it.

What the next matmul wants is a number for QUANTIZE: 0 the row as it is, 7 or 127 integers up to that, and more than 127
two int8 digits of integers up to that (`Backend.digits`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quasar.backends.base import widest
from quasar_gpu.kernels.launch import (
    MOST_ROWS,
    await_inputs,
    jit,
    launch,
    round_to_int8,
    rounded,
    row_scale_of,
    silu_times,
)
from quasar_gpu.kernels.linear import LEAST_KEY

INT8, INT4 = 127, 7  # the largest value of each
_EMBED_BLOCK = 1024
_SHARE = 1536  # values of a row that one of several programs quantises: Qwen3-8B's 12288 in eight


def embed(table: Tensor, ids: Tensor, out: Tensor, keys: Tensor | None = None) -> None:
    """Rows `ids` (int64 [rows], on the device) of `table` [vocab, hidden] -> out [rows, hidden], in out's type.

    keys int64 [MOST_ROWS]: made ready for a product with `linear.Best`, as many as there are rows.
    """
    rows, hidden = out.shape
    grid = (rows, triton.cdiv(hidden, _EMBED_BLOCK))
    more = {"HAS_KEYS": keys is not None, "LEAST": LEAST_KEY, "MOST_ROWS": MOST_ROWS, "BLOCK": _EMBED_BLOCK}
    launch(_embed, grid, table, ids, out, ids if keys is None else keys, hidden, warps=4, **more)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    out: Tensor,
    peaks: Tensor | None = None,
) -> None:
    """total = x + residual; out = RMSNorm(total) * weight; all [rows, hidden], weight [hidden].

    `total` may be `residual` itself. Without a residual, x is normalised and `total` is left alone. As in the reference
    the sum is rounded to its type before it is normalised in float32; the mean is summed in another order, so a value
    may differ in its last place. peaks int32 [rows]: made ready for a product with `linear.SwiGLU`.
    """
    _launch_norm(x, residual, weight, eps, total, out, out, peaks)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    values: Tensor,
    scale: Tensor,
    peaks: Tensor | None = None,
) -> None:
    """add_rms_norm, then `quantize`, or `digits` where there is room for two: values int8 [rows or 2 * rows, hidden],
    scale float32 [rows].

    The normed row is rounded to x's type before it is quantised, which only keeps the reference's numbers.
    """
    _launch_norm(x, residual, weight, eps, total, values, scale, peaks)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """gate_up [rows, 2 * inter], gate first -> out [rows, inter] = silu(gate) * up.

    silu is computed in float32 and rounded to gate_up's type, as in the reference; its exponential is the card's,
    within 2 units in the last place of float32.
    """
    _launch_rows(_swiglu, gate_up, out, out, 0)


def swiglu_quantize(gate_up: Tensor, values: Tensor, scale: Tensor) -> None:
    """swiglu, then `quantize`, or `digits` where there is room for two: values int8 [rows or 2 * rows, inter], scale
    float32 [rows]."""
    _launch_rows(_swiglu, gate_up, values, scale, _limit(gate_up.shape[0], values))


def quantize(x: Tensor, values: Tensor, scale: Tensor, limit: int = INT8) -> None:
    """x [rows, n] -> values int8 [rows, n] between -limit and limit, 127 or 7 for int4, scale float32 [rows]:
    max|row| / limit, 1 for zeros; rounds half to even. Bit for bit the reference's.
    """
    _launch_rows(_quantize, x, values, scale, limit)


def digits(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """x [rows, n] -> values int8 [2 * rows, n]: of all rows the upper digits of integers, then the lower ones; scale
    float32 [rows] of the lower ones, the upper ones' is 16 times that. Bit for bit the reference's (`Backend.digits`).
    """
    _launch_rows(_quantize, x, values, scale, widest(x.shape[1]))


def quantize_by_peak(x: Tensor, peaks: Tensor, values: Tensor, scale: Tensor) -> None:
    """`quantize` to int8 by several programs a row, or `digits` where values [2 * rows, n] has room for two; peaks
    int32 [rows] has max|row| already (`launch.as_peak`)."""
    rows, size = x.shape
    grid = (rows, triton.cdiv(size, _SHARE))
    limit = _limit(rows, values)
    launch(
        _quantize_by_peak, grid, x, peaks, values, scale, rows, size, warps=4, QUANTIZE=limit, SHARE=_SHARE, BLOCK=2048
    )


def _limit(rows: int, values: Tensor) -> int:
    """The largest integer of rows quantised into `values`."""
    return INT8 if values.shape[0] == rows else widest(values.shape[1])


def _warps(block: int) -> int:
    """16 elements a thread, in 4 to 16 warps: short chains of loads without spilling."""
    return min(max(block // 512, 4), 16)


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    out: Tensor,
    scale: Tensor,
    peaks: Tensor | None,
) -> None:
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    launch(
        _add_rms_norm,
        (rows,),
        *(
            x,
            x if residual is None else residual,
            weight,
            eps,
            total,
            out,
            scale,
            x if peaks is None else peaks,
            rows,
            hidden,
        ),
        warps=_warps(block),
        ADD=residual is not None,
        QUANTIZE=0 if out is scale else _limit(rows, out),
        HAS_PEAKS=peaks is not None,
        BLOCK=block,
    )


def _launch_rows(kernel: triton.JITFunction, x: Tensor, out: Tensor, scale: Tensor, limit: int) -> None:
    rows, size = x.shape[0], out.shape[1]
    block = triton.next_power_of_2(size)
    launch(kernel, (rows,), x, out, scale, rows, size, warps=_warps(block), QUANTIZE=limit, BLOCK=block)


@jit()
def _embed(
    table, ids, out, keys, hidden,
    HAS_KEYS: tl.constexpr, LEAST: tl.constexpr, MOST_ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    await_inputs(DEPENDENT)
    source = tl.load(ids + row) * hidden
    x = tl.load(table + source + column, mask=column < hidden)
    tl.store(out + row * hidden + column, x.to(tl.float32).to(out.dtype.element_ty), mask=column < hidden)
    if HAS_KEYS:
        tl.store(keys + row, LEAST, mask=row < MOST_ROWS)


@jit(varying=("eps", "rows"))
def _add_rms_norm(
    x, residual, weight, eps, total, out, scale, peaks, rows, hidden,
    ADD: tl.constexpr, QUANTIZE: tl.constexpr, HAS_PEAKS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    here, inside = row * hidden + column, column < hidden
    dtype = x.dtype.element_ty
    await_inputs(DEPENDENT)
    y = tl.load(x + here, mask=inside, other=0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        y += tl.load(residual + here, mask=inside, other=0).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
        tl.store(total + here, y.to(dtype), mask=inside)
    if HAS_PEAKS:
        tl.store(peaks + row, 0)
    mean = tl.div_rn(tl.sum(y * y, axis=0), hidden.to(tl.float32))
    y = (y * tl.div_rn(1.0, tl.sqrt_rn(mean + eps)) * gain).to(dtype)
    _store_row(y, out, scale, row, rows * hidden, here, inside, QUANTIZE)


@jit(varying=("rows",))
def _swiglu(
    gate_up, out, scale, rows, inter, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < inter
    dtype = gate_up.dtype.element_ty
    await_inputs(DEPENDENT)
    gate = tl.load(gate_up + row * 2 * inter + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * inter + column, mask=inside, other=0).to(tl.float32)
    y = silu_times(gate, up, dtype).to(dtype)
    _store_row(y, out, scale, row, rows * inter, row * inter + column, inside, QUANTIZE)


@jit(varying=("rows",))
def _quantize(
    x, out, scale, rows, size, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    here, inside = row * size + column, column < size
    await_inputs(DEPENDENT)
    _store_row(tl.load(x + here, mask=inside, other=0), out, scale, row, rows * size, here, inside, QUANTIZE)


@jit(varying=("rows",))
def _quantize_by_peak(
    x, peaks, values, scale, rows, size,
    QUANTIZE: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, share = tl.program_id(0), tl.arange(0, BLOCK)
    column = tl.program_id(1) * SHARE + share
    here, inside = row * size + column, (column < size) & (share < SHARE)
    await_inputs(DEPENDENT)
    y = tl.load(x + here, mask=inside, other=0).to(tl.float32)
    row_scale = row_scale_of(tl.load(peaks + row).to(tl.float32, bitcast=True), QUANTIZE)
    _store_integers(y, row_scale, values, rows * size, here, inside, QUANTIZE)
    if tl.program_id(1) == 0:
        tl.store(scale + row, row_scale)


@triton.jit
def _store_row(y, out, scale, row, lower, here, inside, QUANTIZE: tl.constexpr):
    """As it is, or quantised; lower: how far behind the upper digits the lower ones go."""
    if QUANTIZE:
        y = y.to(tl.float32)
        row_scale = row_scale_of(tl.max(tl.abs(y), axis=0), QUANTIZE)
        _store_integers(y, row_scale, out, lower, here, inside, QUANTIZE)
        tl.store(scale + row, row_scale)
    else:
        tl.store(out + here, y, mask=inside)


@triton.jit
def _store_integers(y, row_scale, out, lower, here, inside, QUANTIZE: tl.constexpr):
    y = tl.div_rn(y, row_scale)
    if QUANTIZE > 127:
        whole = rounded(y)
        upper = tl.floor((whole + 8.0) * 0.0625)
        tl.store(out + here, upper.to(tl.int8), mask=inside)
        tl.store(out + lower + here, (whole - 16.0 * upper).to(tl.int8), mask=inside)
    else:
        tl.store(out + here, round_to_int8(y), mask=inside)
