"""Matmuls of at most 64 rows, bound by reading the weights once: int8 with the rescale fused, 16-bit and float32.

The weights are the first operand of the tensor cores' instruction and 16 rows the second, which may be that narrow.
A program owns a block of outputs and walks the whole inner dimension through a ring of asynchronously filled blocks in
shared memory; a card needs some 20 to 40 KB under way on each processor to keep its memory busy (3 TB/s times 1 us
of latency over 132 of them). More than 16 rows of floats are two or four tiles, multiplied one after the other with
each block of weights while it is there: by the same instruction in the same order, so a row's bits are those it has
alone. Sums of integers are exact however they are cut: their rows are one tile of 16 to 128 columns.

A wide input has two columns, one for each int8 digit: six rows of them still fill one tile of 16. The columns of a row
lie side by side, in one thread's registers, where their sums meet.

What follows a product may be fused into its end (`Epilogue`): SwiGLU, for which a program owns outputs of the gate and
the same ones of up; or the largest logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_gpu.kernels.launch import (
    WINDOW,
    as_peak,
    await_inputs,
    jit,
    launch,
    launching,
    let_next_start,
    row_tiles,
    silu_times,
)

LEAST_KEY = -(1 << 63)  # what a row's key starts from


@dataclass(frozen=True)
class LinearConfig:
    """How a matmul is cut: outputs a program, bytes of a weight's row a step, warps, blocks in the ring."""

    outputs: int
    bytes_inside: int
    warps: int
    stages: int


# By tiles of 16 rows, eight being 64 rows of two digits. Many outputs: 64 of them fill the large instruction (wgmma
# m64n16 on Hopper), and there are programs enough. From four tiles on twice as many, since each program reads all rows
# from L2.
_WIDE = {
    1: LinearConfig(outputs=64, bytes_inside=128, warps=4, stages=5),
    2: LinearConfig(outputs=64, bytes_inside=128, warps=4, stages=5),
    4: LinearConfig(outputs=128, bytes_inside=128, warps=8, stages=4),
    8: LinearConfig(outputs=128, bytes_inside=128, warps=8, stages=3),
}
# Some thousand outputs: the small instruction (m16n8), 16 outputs to a program, and two warps, since that makes two of
# it. Every processor then has two or three programs of Qwen3-8B's o and down (256) and qkv (384).
_NARROW = {
    1: LinearConfig(outputs=16, bytes_inside=256, warps=2, stages=8),
    2: LinearConfig(outputs=32, bytes_inside=256, warps=4, stages=5),
    4: LinearConfig(outputs=32, bytes_inside=256, warps=4, stages=4),
    8: LinearConfig(outputs=32, bytes_inside=128, warps=4, stages=4),
}
# float32 has no exact tensor core instruction: plain multiply-adds, in blocks that fit the registers.
_FLOAT32 = LinearConfig(outputs=32, bytes_inside=128, warps=4, stages=3)
_MANY = 16384  # outputs


def linear_config(outputs: int, dtype: torch.dtype, tiles: int = 1) -> LinearConfig:
    """The cut for a weight [outputs, in] of `dtype` and so many tiles of 16 rows, or of 8 rows of digits: from shapes
    alone.

    A float weight keeps its instruction and its steps along the inner dimension at every number of tiles, and so its
    sums.
    """
    if dtype == torch.float32:
        return _FLOAT32
    return (_WIDE if outputs >= _MANY else _NARROW)[tiles]


def linear_configs() -> list[LinearConfig]:
    """Cuts worth timing on a card at up to 16 rows, for int8 and 16-bit weights."""
    return [
        _WIDE[1],
        _NARROW[1],
        LinearConfig(outputs=16, bytes_inside=512, warps=2, stages=5),
        LinearConfig(outputs=32, bytes_inside=256, warps=4, stages=6),
        LinearConfig(outputs=64, bytes_inside=256, warps=4, stages=4),
        LinearConfig(outputs=128, bytes_inside=128, warps=8, stages=4),
        LinearConfig(outputs=32, bytes_inside=512, warps=4, stages=4),
        LinearConfig(outputs=32, bytes_inside=128, warps=2, stages=8),
    ]


@dataclass(frozen=True)
class SwiGLU:
    """out [rows, outputs / 2] = silu(gate) * up; `peaks` int32 [rows], zeros before: max|out| as `as_peak` has it."""

    peaks: Tensor


@dataclass(frozen=True)
class Best:
    """Besides `out`: keys int64 [rows], LEAST_KEY before, from which `best_tokens` reads the first largest output."""

    keys: Tensor


Epilogue = SwiGLU | Best | None


def best_tokens(keys: Tensor) -> Tensor:
    """keys int64 [rows] -> the output's index [rows]."""
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def int8_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: LinearConfig | None = None,
    epilogue: Epilogue = None,
) -> None:
    """out[i, n] = (sum over k of values[i, k] * weight[n, k]) * scale[i] * weight_scale[n] + bias[n].

    values int8 [rows, in], scale float32 [rows], weight int8 [out, in], weight_scale and bias float32 [out], out
    [rows, out] of bfloat16, float16 or float32. Inputs that are 16 * upper + lower have values [2 * rows, in], of all
    rows first the upper digits, and the scale of the lower ones (`rows.digits`); both digits' sums meet as integers.

    Bit for bit the reference's: the sums are exact, the rest is float32 in the same order, rounded once. (int32 holds
    any sum up to in = 131071.) Reads in * out bytes, once. Raises QuasarError for more than 64 rows.
    """
    digits = values.shape[0] // scale.shape[0]
    _launch(_int8_linear, values, weight, (scale, weight_scale), bias, out, config, epilogue, digits)


def float_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: LinearConfig | None = None,
    epilogue: Epilogue = None,
) -> None:
    """out = x @ weight.T + bias: x [rows, in] and weight [out, in] of one type, float16, bfloat16 or float32.

    out [rows, out] is of that type or float32 (logits). Sums are float32, without TF32, in an order of their own: they
    differ from the reference's by rounding, but are the same for every number of rows. Reads in * out elements.
    Raises QuasarError for more than 64 rows.
    """
    _launch(_float_linear, x, weight, (), bias, out, config, epilogue)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, ...],
    bias: Tensor | None,
    out: Tensor,
    config: LinearConfig | None,
    epilogue: Epilogue,
    digits: int = 1,
) -> None:
    rows, inner = x.shape[0] // digits, x.shape[1]
    outputs = weight.shape[0]
    tiles = row_tiles(rows, digits)
    config = config or linear_config(outputs, weight.dtype, tiles)
    block = config.bytes_inside // weight.element_size()
    extra, kind = epilogue_of(epilogue, out)
    tiling = {"COLUMNS": tiles * WINDOW, "DIGITS": digits} if scales else {"TILES": tiles, "WINDOW": WINDOW}
    launch(
        kernel,
        (triton.cdiv(outputs, config.outputs),),
        *(x, weight, *scales, weight if bias is None else bias, out, extra, rows, outputs, inner),
        warps=config.warps,
        stages=config.stages,
        HAS_BIAS=bias is not None,
        EVEN=inner % block == 0,
        EPILOGUE=kind,
        OUTPUTS=config.outputs,
        BLOCK=block,
        PREFETCH=prefetch_bytes(x.device, inner * weight.element_size(), config.outputs >= 64),
        **tiling,
    )


def epilogue_of(epilogue: Epilogue, out: Tensor) -> tuple[Tensor, int]:
    """The tensor that it adds to a launch, and its number."""
    if isinstance(epilogue, SwiGLU):
        return epilogue.peaks, 1
    return (epilogue.keys, 2) if isinstance(epilogue, Best) else (out, 0)


def prefetch_bytes(device: torch.device, row_bytes: int, wide: bool) -> int:
    """Bytes that each of 128 requests of a program fetches; two programs share a processor where they are wide."""
    how = launching(device)
    size = how.prefetch_kb * 1024 // 128 // 2
    fits = size <= row_bytes and row_bytes % 16 == 0
    return size if how.dependent and fits else 0


@jit(varying=("rows",))
def _int8_linear(
    x, weight, scale, weight_scale, bias, out, extra, rows, outputs, inner,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, EPILOGUE: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, DIGITS: tl.constexpr, PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """COLUMNS: of the tile of all rows; a row's digits are next to each other there, and all rows apart in memory."""
    n = outputs_of(outputs, OUTPUTS, EPILOGUE)
    prefetch_weights(weight, outputs, inner, OUTPUTS, EPILOGUE, PREFETCH)
    await_inputs(DEPENDENT)
    # Outputs beyond the last repeat it and are not stored: loads need no mask for them.
    here = tl.minimum(n, outputs - 1)
    column, k = tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    row = column // DIGITS
    weight_at = weight + here.to(tl.int64)[:, None] * inner + k[None, :]
    x_at = x + (row + column % DIGITS * rows)[None, :] * inner + k[:, None]
    sums = tl.zeros((OUTPUTS, COLUMNS), dtype=tl.int32)
    for start in range(0, inner, BLOCK):
        if EVEN:
            there = (row < rows)[None, :] & (k < BLOCK)[:, None]
            w = tl.load(weight_at)
        else:
            inside = k < inner - start
            there = (row < rows)[None, :] & inside[:, None]
            w = tl.load(weight_at, mask=inside[None, :], other=0)
        sums = tl.dot(w, tl.load(x_at, mask=there, other=0), sums, out_dtype=tl.int32)
        weight_at += BLOCK
        x_at += BLOCK
    let_next_start(DEPENDENT)
    if DIGITS == 2:
        upper, lower = tl.split(tl.reshape(sums, (OUTPUTS, COLUMNS // 2, 2)))
        sums = 16 * upper + lower
    m = tl.arange(0, COLUMNS // DIGITS)
    y = sums.to(tl.float32) * tl.load(scale + m, mask=m < rows, other=0)[None, :]
    y *= tl.load(weight_scale + here)[:, None]
    finish(y, bias, out, extra, n, m, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, COLUMNS // DIGITS)


@jit(varying=("rows",))
def _float_linear(
    x, weight, bias, out, extra, rows, outputs, inner,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, EPILOGUE: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, WINDOW: tl.constexpr, PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    n = outputs_of(outputs, OUTPUTS, EPILOGUE)
    prefetch_weights(weight, outputs, inner, OUTPUTS, EPILOGUE, PREFETCH)
    await_inputs(DEPENDENT)
    sums0, sums1, sums2, sums3 = _dot(x, weight, n, rows, outputs, inner, EVEN, OUTPUTS, BLOCK, TILES, WINDOW)
    let_next_start(DEPENDENT)
    m = tl.arange(0, WINDOW)
    finish(sums0, bias, out, extra, n, m, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, WINDOW)
    if TILES > 1:
        finish(sums1, bias, out, extra, n, m + WINDOW, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, WINDOW)
    if TILES > 2:
        finish(sums2, bias, out, extra, n, m + 2 * WINDOW, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, WINDOW)
        finish(sums3, bias, out, extra, n, m + 3 * WINDOW, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, WINDOW)


@triton.jit
def outputs_of(outputs, OUTPUTS: tl.constexpr, EPILOGUE: tl.constexpr):
    """This program's outputs [OUTPUTS]; for SwiGLU half of them of the gate, then the same ones of up. Those beyond the
    last are `outputs` and more."""
    i = tl.arange(0, OUTPUTS)
    if EPILOGUE == 1:
        half: tl.constexpr = OUTPUTS // 2
        n = tl.program_id(0) * half + i % half
        n = tl.where(n < outputs // 2, n + i // half * (outputs // 2), outputs)
    else:
        n = tl.program_id(0) * OUTPUTS + i
    return n


@triton.jit
def _dot(
    x, weight, n, rows, outputs, inner,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """This program's block of weight @ x.T for up to four tiles of rows, float32 [OUTPUTS, WINDOW] each. Missing rows
    of x count as zeros."""
    # Outputs beyond the last repeat it and are not stored: loads need no mask for them.
    n = tl.minimum(n, outputs - 1)
    m, k = tl.arange(0, WINDOW), tl.arange(0, BLOCK)
    weight_at = weight + n.to(tl.int64)[:, None] * inner + k[None, :]
    x_at = x + m[None, :] * inner + k[:, None]
    sums0 = tl.zeros((OUTPUTS, WINDOW), dtype=tl.float32)
    sums1 = tl.zeros((OUTPUTS, WINDOW), dtype=tl.float32)
    sums2 = tl.zeros((OUTPUTS, WINDOW), dtype=tl.float32)
    sums3 = tl.zeros((OUTPUTS, WINDOW), dtype=tl.float32)
    for start in range(0, inner, BLOCK):
        if EVEN:
            inside = k < BLOCK
            w = tl.load(weight_at)
        else:
            inside = k < inner - start
            w = tl.load(weight_at, mask=inside[None, :], other=0)
        there = (m < rows)[None, :] & inside[:, None]
        sums0 = tl.dot(w, tl.load(x_at, mask=there, other=0), sums0, input_precision="ieee")
        if TILES > 1:
            there = (m + WINDOW < rows)[None, :] & inside[:, None]
            tile = tl.load(x_at + WINDOW * inner, mask=there, other=0)
            sums1 = tl.dot(w, tile, sums1, input_precision="ieee")
        if TILES > 2:
            there = (m + 2 * WINDOW < rows)[None, :] & inside[:, None]
            tile = tl.load(x_at + 2 * WINDOW * inner, mask=there, other=0)
            sums2 = tl.dot(w, tile, sums2, input_precision="ieee")
            there = (m + 3 * WINDOW < rows)[None, :] & inside[:, None]
            tile = tl.load(x_at + 3 * WINDOW * inner, mask=there, other=0)
            sums3 = tl.dot(w, tile, sums3, input_precision="ieee")
        weight_at += BLOCK
        x_at += BLOCK
    return sums0, sums1, sums2, sums3


@triton.jit
def prefetch_weights(
    weight, outputs, inner, OUTPUTS: tl.constexpr, EPILOGUE: tl.constexpr, PREFETCH: tl.constexpr
):  # fmt: skip
    """Starts this program's first weights on their way into L2 while the previous kernel still runs: 128 pieces of
    PREFETCH bytes, those of a row one after the other, none beyond its end."""
    if PREFETCH:
        piece: tl.constexpr = PREFETCH * 8 // weight.dtype.element_ty.primitive_bitwidth  # elements
        n = tl.minimum(outputs_of(outputs, OUTPUTS, EPILOGUE), outputs - 1)
        k = tl.minimum(tl.arange(0, 128 // OUTPUTS) * piece, inner - piece)
        address = (weight + n.to(tl.int64)[:, None] * inner + k[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address, PREFETCH],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def finish(
    y, bias, out, extra, n, m, rows, outputs,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, OUTPUTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds the bias and stores y [OUTPUTS, WINDOW], with what EPILOGUE asks for."""
    dtype = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)[:, None]
    if EPILOGUE == 1:
        half: tl.constexpr = OUTPUTS // 2
        inter = outputs // 2
        y = y.to(dtype).to(tl.float32)
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, half, WINDOW)), (1, 2, 0)))
        first = tl.program_id(0) * half + tl.arange(0, half)
        inside = (first < inter)[:, None] & (m < rows)[None, :]
        y = tl.where(inside, silu_times(gate, up, dtype), 0.0)
        tl.store(out + m[None, :] * inter + first[:, None], y.to(dtype), mask=inside)
        tl.atomic_max(extra + m, tl.max(as_peak(y), axis=0), mask=m < rows, sem="relaxed")
    else:
        inside = (n < outputs)[:, None] & (m < rows)[None, :]
        tl.store(out + m[None, :] * outputs + n[:, None], y.to(dtype), mask=inside)
        if EPILOGUE == 2:
            # Larger first, then the lower index: a signed integer that orders floats, above the index's complement.
            bits = tl.where(y == 0, 0.0, y).to(tl.int32, bitcast=True)
            order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
            key = (order << 32) | (4294967295 - n.to(tl.int64))[:, None]
            key = tl.max(tl.where(inside, key, -0x7FFFFFFFFFFFFFFF), axis=0)
            tl.atomic_max(extra + m, key, mask=m < rows, sem="relaxed")
