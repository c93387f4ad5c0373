"""Matmuls of at most 16 rows, bound by reading the weights once: int8 with the rescale fused, 16-bit and float32.

The weights are the first operand of the tensor cores' instruction and the window, padded to 16 rows, the second,
which may be that small. A program owns a block of outputs and walks the whole inner dimension through a ring of
asynchronously filled blocks in shared memory; a card needs some 20 to 40 KB under way on each processor to keep its
memory busy (3 TB/s times 1 us of latency over 132 of them). Weights are the first that L2 may forget (evict_first),
since a pass reads none twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_gpu.kernels.launch import WINDOW, await_inputs, check_window, jit, launch


@dataclass(frozen=True)
class LinearConfig:
    """How a matmul is cut: outputs a program, bytes of a weight's row a step, warps, blocks in the ring."""

    outputs: int
    bytes_inside: int
    warps: int
    stages: int


# Many outputs: 64 of them fill the large instruction (wgmma m64n16 on Hopper), and there are programs enough.
_WIDE = LinearConfig(outputs=64, bytes_inside=128, warps=4, stages=5)
# Some thousand: smaller blocks, so that every processor has one, and longer steps, so that as many bytes are under way.
_MIDDLE = LinearConfig(outputs=32, bytes_inside=256, warps=4, stages=6)
_NARROW = LinearConfig(outputs=16, bytes_inside=512, warps=4, stages=5)
# float32 has no exact tensor core instruction: plain multiply-adds, in blocks that fit the registers.
_FLOAT32 = LinearConfig(outputs=32, bytes_inside=128, warps=4, stages=3)


def linear_config(out: int, dtype: torch.dtype) -> LinearConfig:
    """The cut for a weight [out, in] of `dtype`: from the shape alone, so sums never change from run to run."""
    if dtype == torch.float32:
        return _FLOAT32
    if out >= 16384:  # 256 programs or more
        return _WIDE
    return _MIDDLE if out >= 3072 else _NARROW


def linear_configs() -> list[LinearConfig]:
    """Cuts worth timing on a card, for int8 and 16-bit weights."""
    return [
        _WIDE,
        _MIDDLE,
        _NARROW,
        LinearConfig(outputs=64, bytes_inside=256, warps=4, stages=4),
        LinearConfig(outputs=128, bytes_inside=128, warps=8, stages=4),
        LinearConfig(outputs=32, bytes_inside=512, warps=4, stages=4),
        LinearConfig(outputs=32, bytes_inside=128, warps=2, stages=8),
        LinearConfig(outputs=16, bytes_inside=256, warps=2, stages=8),
    ]


def int8_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: LinearConfig | None = None,
) -> None:
    """out[i, n] = (sum over k of values[i, k] * weight[n, k]) * scale[i] * weight_scale[n] + bias[n].

    values int8 [rows, in], scale float32 [rows], weight int8 [out, in], weight_scale and bias float32 [out], out
    [rows, out] of bfloat16, float16 or float32. Bit for bit the reference's: the sums are exact, the rest is float32
    in the same order, rounded once. (int32 holds any sum up to in = 131071.) Reads in * out bytes. Raises QuasarError
    for more than 16 rows.
    """
    _launch(_int8_linear, values, weight, (scale, weight_scale), bias, out, config)


def float_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, config: LinearConfig | None = None
) -> None:
    """out = x @ weight.T + bias: x [rows, in] and weight [out, in] of one type, float16, bfloat16 or float32.

    out [rows, out] is of that type or float32 (logits). Sums are float32, without TF32, in an order of their own: they
    differ from the reference's by rounding, but are the same for every number of rows. Reads in * out elements.
    Raises QuasarError for more than 16 rows.
    """
    _launch(_float_linear, x, weight, (), bias, out, config)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, ...],
    bias: Tensor | None,
    out: Tensor,
    config: LinearConfig | None,
) -> None:
    rows, inner = x.shape
    outputs = weight.shape[0]
    check_window(rows)
    config = config or linear_config(outputs, weight.dtype)
    block = config.bytes_inside // weight.element_size()
    launch(
        kernel,
        (triton.cdiv(outputs, config.outputs),),
        *(x, weight, *scales, weight if bias is None else bias, out, rows, outputs, inner),
        warps=config.warps,
        stages=config.stages,
        HAS_BIAS=bias is not None,
        EVEN=inner % block == 0,
        OUTPUTS=config.outputs,
        BLOCK=block,
        WINDOW=WINDOW,
    )


@jit(varying=("rows",))
def _int8_linear(
    x, weight, scale, weight_scale, bias, out, rows, outputs, inner, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    prefetch_weights(weight, outputs, inner, OUTPUTS, DEPENDENT)
    await_inputs(DEPENDENT)
    sums = _dot(x, weight, rows, outputs, inner, tl.int32, EVEN, OUTPUTS, BLOCK, WINDOW)
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, WINDOW)
    row_scale = tl.load(scale + m, mask=m < rows, other=0)
    y = sums.to(tl.float32) * row_scale[None, :] * tl.load(weight_scale + n, mask=n < outputs, other=0)[:, None]
    store_outputs(y, bias, out, n, m, rows, outputs, HAS_BIAS)


@jit(varying=("rows",))
def _float_linear(
    x, weight, bias, out, rows, outputs, inner, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    prefetch_weights(weight, outputs, inner, OUTPUTS, DEPENDENT)
    await_inputs(DEPENDENT)
    sums = _dot(x, weight, rows, outputs, inner, tl.float32, EVEN, OUTPUTS, BLOCK, WINDOW)
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, WINDOW)
    store_outputs(sums, bias, out, n, m, rows, outputs, HAS_BIAS)


@triton.jit
def _dot(
    x, weight, rows, outputs, inner, SUM: tl.constexpr,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """This program's block of weight @ x.T, [OUTPUTS, WINDOW] of SUM. Missing rows of x count as zeros."""
    # Outputs beyond the last repeat it and are not stored: loads need no mask for them.
    n = tl.minimum(tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), outputs - 1)
    m, k = tl.arange(0, WINDOW), tl.arange(0, BLOCK)
    weight_at = weight + n.to(tl.int64)[:, None] * inner + k[None, :]
    x_at = x + m[None, :] * inner + k[:, None]
    sums = tl.zeros((OUTPUTS, WINDOW), dtype=SUM)
    for start in range(0, inner, BLOCK):
        if EVEN:
            w = tl.load(weight_at, eviction_policy="evict_first")
            tokens = tl.load(x_at, mask=(m < rows)[None, :], other=0)
        else:
            inside = k < inner - start
            w = tl.load(weight_at, mask=inside[None, :], other=0, eviction_policy="evict_first")
            tokens = tl.load(x_at, mask=(m < rows)[None, :] & inside[:, None], other=0)
        sums = tl.dot(w, tokens, sums, input_precision="ieee", out_dtype=SUM)
        weight_at += BLOCK
        x_at += BLOCK
    return sums


@triton.jit
def prefetch_weights(weight, outputs, inner, OUTPUTS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Starts this program's first 32 KB of weights on their way into L2, while the previous kernel still runs."""
    if DEPENDENT:
        line: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
        n = tl.minimum(tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), outputs - 1)
        k = tl.minimum(tl.arange(0, 256 // OUTPUTS) * line, inner - 1)
        address = (weight + n.to(tl.int64)[:, None] * inner + k[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def store_outputs(y, bias, out, n, m, rows, outputs, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)[:, None]
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    tl.store(out + m[None, :] * outputs + n[:, None], y.to(out.dtype.element_ty), mask=inside)
