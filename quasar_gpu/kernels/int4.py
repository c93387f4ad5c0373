"""int4 weights under 16-bit (W4A16) or int4 activations (W4A4), over one packed copy; and the rotation before them.

Groups of inputs lie in pairs: a byte holds an input of an even group in its low nibble and the same input of the next
group in its high one, so that a row's bytes are read 16 at a time, each half is a whole group, and x is read in
order. A nibble becomes an int8 sixteen times its value by a shift (low) or a mask (high), signs and all, which float16
and bfloat16 hold exactly. A group's sum is one product of the tensor cores: exact in int32, or float32 sums of exact
products; it is scaled in float32, and the sixteenth is taken off at the end, which rounds nothing.

Where groups have zero points, a weight is nibble * scale + offset: the offset meets the sum of the group's inputs. The
tensor cores compute that too, as the product with weights that are all one. At few rows they have the time, every
output has the sum in its place, and no kernel before has to leave it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quasar_gpu.kernels.launch import WINDOW, await_inputs, jit, launch, let_next_start, triton_at_least
from quasar_gpu.kernels.linear import Epilogue, epilogue_of, finish, outputs_of, prefetch_bytes, prefetch_weights

_TALL = 64  # rows of the tile for more than a window: a batch reads and unpacks its weights once
# And for a handful: what is done to sums then takes half the instructions. Older Tritons multiply no such tile.
_FEW = 8 if triton_at_least(3, 4) else WINDOW


@dataclass(frozen=True)
class Int4Weight:
    """values int8 [out, pairs * group], two nibbles each; scale bfloat16 [out, 2 * pairs], offset likewise or None.
    Where the number of groups is odd, the last pair's second is zeros."""

    values: Tensor
    scale: Tensor
    group: int
    offset: Tensor | None = None


def pack_int4(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Int4Weight:
    """values int8 [out, in] between -8 and 7, scale [out, in / group] and offset likewise (None: 0), group 32, 64 or
    128, in the kernel's layout. A weight is values * scale + offset.

    Raises ValueError for other groups.
    """
    outputs, groups = scale.shape
    group = values.shape[1] // groups
    if group not in (32, 64, 128) or group * groups != values.shape[1]:
        raise ValueError(f"{values.shape[1]} inputs in {groups} groups; a group has 32, 64 or 128")
    odd = groups % 2
    low, high = F.pad(values, (0, odd * group)).view(outputs, -1, 2, group).unbind(2)
    packed = (low & 15) | (high << 4)
    scale, moved = (None if x is None else F.pad(x.bfloat16(), (0, odd)).contiguous() for x in (scale, offset))
    return Int4Weight(packed.view(outputs, -1), scale, group, moved)


@dataclass(frozen=True)
class Int4Config:
    """How a matmul is cut: outputs and rows a program, inputs of a group a step, warps, blocks in the ring. A block has
    the weights of up to 256 inputs, as many groups as those are."""

    outputs: int
    rows: int
    step: int
    warps: int
    stages: int


def int4_config(rows: int, outputs: int, group: int, dtype: torch.dtype) -> Int4Config:
    """The cut for `rows` rows of `dtype`. A row's sums never depend on it: those of int8 are exact, those of floats go
    through the same small instruction, in the same order, in every cut."""
    if dtype == torch.float32:  # no exact tensor core instruction: plain multiply-adds in small blocks
        return Int4Config(outputs=32, rows=WINDOW, step=32, warps=4, stages=2)
    if rows > WINDOW:
        return Int4Config(outputs=32, rows=_TALL, step=group, warps=4, stages=2)
    few = WINDOW if rows > _FEW else _FEW
    if outputs >= 16384 and dtype == torch.int8:
        # 256 programs or more, and 64 outputs fill the large instruction. With 16-bit inputs, unpacking for that one
        # takes 5 instructions a nibble, for the small one 3, which is what memory leaves time for.
        return Int4Config(outputs=64, rows=WINDOW, step=group, warps=4, stages=5)
    # A warp for each 16 outputs: more of them would unpack the same weights again.
    if outputs >= 3072:
        return Int4Config(outputs=32, rows=few, step=group, warps=2, stages=7)
    return Int4Config(outputs=16, rows=few, step=group, warps=1, stages=8)


def int4_configs(group: int) -> list[Int4Config]:
    """Cuts worth timing on a card at up to 8 rows."""
    return [
        Int4Config(outputs=64, rows=WINDOW, step=group, warps=4, stages=5),
        Int4Config(outputs=32, rows=_FEW, step=group, warps=2, stages=7),
        Int4Config(outputs=32, rows=_FEW, step=group, warps=2, stages=4),
        Int4Config(outputs=16, rows=_FEW, step=group, warps=1, stages=8),
    ]


def int4_linear(
    x: Tensor,
    scale: Tensor | None,
    weight: Int4Weight,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue = None,
    config: Int4Config | None = None,
) -> None:
    """out[i, n] = (sum over groups g of weight.scale[n, g] * sum of x[i, g] * weight[n, g]
    + weight.offset[n, g] * sum of x[i, g]) * scale[i] + bias[n].

    x [rows, in]: int8 with scale float32 [rows], or float16, bfloat16 or float32 and None; bias [out] or None; out
    [rows, out] of any float type. Sums of int8 groups are exact; those of floats, and those over groups, in order, are
    float32 without TF32: the reference rounds to bfloat16 on the way, this does not. The same for every window of up to
    16 rows; longer passes compute the same in taller tiles. Reads in * out / 2 bytes, the scales and the offsets.
    """
    rows, inner = x.shape
    outputs = weight.values.shape[0]
    config = config or int4_config(rows, outputs, weight.group, x.dtype)
    extra, kind = epilogue_of(epilogue, out)
    launch(
        _int4_linear,
        (triton.cdiv(outputs, config.outputs), triton.cdiv(rows, config.rows)),
        *(x, weight.values, weight.scale if scale is None else scale, weight.scale),
        weight.scale if weight.offset is None else weight.offset,
        *(weight.scale if bias is None else bias, out, extra, rows, outputs, inner),
        warps=config.warps,
        stages=config.stages,
        ASSEMBLY=x.device.type != "cpu",  # Triton's interpreter has none
        QUANTIZED=scale is not None,
        OFFSETS=weight.offset is not None,
        HAS_BIAS=bias is not None,
        EVEN=inner % (2 * weight.group) == 0,
        EPILOGUE=kind,
        OUTPUTS=config.outputs,
        ROWS=config.rows,
        GROUP=weight.group,
        STEP=config.step,
        TOGETHER=_pairs_together(inner, weight.group, 1 if config.rows > WINDOW else 4),
        PREFETCH=prefetch_bytes(x.device, weight.values.shape[1], config.outputs >= 64),
    )


def _pairs_together(inner: int, group: int, most: int) -> int:
    """Pairs of groups whose weights are one block: small groups by themselves would leave too little under way."""
    pairs = -(-inner // (2 * group))
    return next(count for count in (4, 2, 1) if count <= most and count * group <= 128 and pairs % count == 0)


def rotate(x: Tensor, hadamard: Tensor, out: Tensor) -> None:
    """Each block of x [rows, in] times hadamard [block, block] -> out, all of one type; sums in float32."""
    block = len(hadamard)
    vectors = x.numel() // block
    width = min(max(block, 16), 64)
    launch(
        _rotate,
        (triton.cdiv(vectors, 16), triton.cdiv(block, width)),
        *(x, hadamard, out, vectors, block),
        warps=4,
        stages=2,
        VECTORS=16,
        WIDTH=width,
        STEP=16 if x.element_size() == 4 else width,
    )


@jit(varying=("rows",))
def _int4_linear(
    x, weight, row_scale, scale, offset, bias, out, extra, rows, outputs, inner,
    ASSEMBLY: tl.constexpr, QUANTIZED: tl.constexpr, OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    EPILOGUE: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    TOGETHER: tl.constexpr, PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pairs = tl.cdiv(inner, 2 * GROUP)
    n = outputs_of(outputs, OUTPUTS, EPILOGUE)
    prefetch_weights(weight, outputs, pairs * GROUP, OUTPUTS, EPILOGUE, PREFETCH)
    await_inputs(DEPENDENT)
    SUM: tl.constexpr = tl.int32 if QUANTIZED else tl.float32
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    # Outputs beyond the last repeat it and are not stored: loads need no mask for them.
    here = tl.minimum(n, outputs - 1)
    weight_at = weight + here.to(tl.int64)[:, None] * (pairs * GROUP) + k[None, :]
    scale_at, offset_at = scale + here * (2 * pairs), offset + here * (2 * pairs)
    x_at = x + m[None, :] * inner + k[:, None]
    there = (m < rows)[None, :]
    totals = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for block in range(0, pairs, TOGETHER):
        for i in tl.static_range(TOGETHER):
            pair = block + i
            # First, to be there when the products are; an output's scales lie together and stay in L1.
            low_scale = tl.load(scale_at + 2 * pair).to(tl.float32)
            high_scale = tl.load(scale_at + 2 * pair + 1).to(tl.float32)
            low = tl.zeros((OUTPUTS, ROWS), dtype=SUM)
            high = tl.zeros((OUTPUTS, ROWS), dtype=SUM)
            if OFFSETS:
                low_offset = tl.load(offset_at + 2 * pair).to(tl.float32)
                high_offset = tl.load(offset_at + 2 * pair + 1).to(tl.float32)
                low_inputs = tl.zeros((OUTPUTS, ROWS), dtype=SUM)
                high_inputs = tl.zeros((OUTPUTS, ROWS), dtype=SUM)
            for step in tl.static_range(0, GROUP, STEP):
                w = tl.load(weight_at + i * GROUP + step)
                low_x = tl.load(x_at + 2 * i * GROUP + step, mask=there, other=0)
                if EVEN:
                    high_x = tl.load(x_at + (2 * i + 1) * GROUP + step, mask=there, other=0)
                else:
                    # All or none: the last pair may have one group.
                    inside = (k < inner - (2 * pair + 1) * GROUP)[:, None]
                    high_x = tl.load(x_at + (2 * i + 1) * GROUP + step, mask=there & inside, other=0)
                low_w = _low_nibbles(w, ASSEMBLY).to(x.dtype.element_ty)
                high_w = _high_nibbles(w, ASSEMBLY).to(x.dtype.element_ty)
                low = tl.dot(low_w, low_x, low, input_precision="ieee", out_dtype=SUM)
                high = tl.dot(high_w, high_x, high, input_precision="ieee", out_dtype=SUM)
                if OFFSETS:
                    # One, as nibbles come. Made of w for the compiler's sake: it gives both products' inputs one
                    # layout, without which they would not go through the ring, and finds out later that it is 16.
                    sixteen = (((w & 1) | 16) & -2).to(x.dtype.element_ty)
                    low_inputs = tl.dot(sixteen, low_x, low_inputs, input_precision="ieee", out_dtype=SUM)
                    high_inputs = tl.dot(sixteen, high_x, high_inputs, input_precision="ieee", out_dtype=SUM)
            totals = tl.fma(low.to(tl.float32), low_scale[:, None], totals)
            totals = tl.fma(high.to(tl.float32), high_scale[:, None], totals)
            if OFFSETS:
                totals = tl.fma(low_inputs.to(tl.float32), low_offset[:, None], totals)
                totals = tl.fma(high_inputs.to(tl.float32), high_offset[:, None], totals)
        weight_at += TOGETHER * GROUP
        x_at += 2 * TOGETHER * GROUP
    let_next_start(DEPENDENT)
    y = totals * 0.0625
    if QUANTIZED:
        y *= tl.load(row_scale + m, mask=m < rows, other=0)[None, :]
    finish(y, bias, out, extra, n, m, rows, outputs, HAS_BIAS, EPILOGUE, OUTPUTS, ROWS)


@triton.jit
def _low_nibbles(w, ASSEMBLY: tl.constexpr):
    """Of int8, times 16. In assembly four bytes a word: the compiler would take them apart one by one."""
    if ASSEMBLY:
        nibbles = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [w], tl.int8, is_pure=True, pack=4
        )
    else:
        nibbles = w << 4
    return nibbles


@triton.jit
def _high_nibbles(w, ASSEMBLY: tl.constexpr):
    """Of int8, times 16."""
    if ASSEMBLY:
        nibbles = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [w], tl.int8, is_pure=True, pack=4)
    else:
        nibbles = w & -16
    return nibbles


@jit(varying=("vectors",))
def _rotate(
    x, hadamard, out, vectors, block,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    vector, k = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS), tl.arange(0, STEP)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    await_inputs(DEPENDENT)
    sums = tl.zeros((VECTORS, WIDTH), dtype=tl.float32)
    for start in range(0, block, STEP):
        inside = start + k < block
        x_at = x + vector[:, None] * block + start + k[None, :]
        values = tl.load(x_at, mask=(vector < vectors)[:, None] & inside[None, :], other=0)
        matrix_at = hadamard + (start + k)[:, None] * block + column[None, :]
        matrix = tl.load(matrix_at, mask=inside[:, None] & (column < block)[None, :], other=0)
        sums = tl.dot(values, matrix, sums, input_precision="ieee")
    stored = (vector < vectors)[:, None] & (column < block)[None, :]
    tl.store(out + vector[:, None] * block + column[None, :], sums.to(out.dtype.element_ty), mask=stored)
