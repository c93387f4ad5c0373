"""Quantisation and the int8 matrix product."""

import torch

from emulated_npu import graphs
from emulated_npu.limits import (
    is_fractal,
    is_inference_card,
    need,
    need_dtype,
    need_emulated,
    need_same_dtype,
    need_shape,
    need_training_card,
)
from quasar.backends.reference import int8_matmul

# The `int` that torch_npu's Python layer makes of a dtype.
DTYPE_CODES = {
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
}
LAST_DIMENSION = 65535


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n] -> int8 [..., n] and its float32 scale [...]: max|row| / 127, rint(x * (127 / max|row|)).

    The kernels multiply by the reciprocal, which they divide once: not the same bits as dividing by the scale.

    The documentation does not say what a row of zeros gives (the formula divides by zero); here it gives
    zeros and scale 0, so that its product is 0 whatever it is multiplied with.
    """
    peak = x.abs().amax(-1)
    quantised = torch.round(x * (127 / peak).unsqueeze(-1))
    return torch.where(peak.unsqueeze(-1) > 0, quantised, 0.0).to(torch.int8), peak / 127


def npu_dynamic_quant(input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max):
    """fp16/bf16 [..., tokens, n] -> int8 of that shape, float32 [..., tokens]."""
    need_training_card("npu_dynamic_quant")
    need_dtype("input", input, torch.float16, torch.bfloat16)
    need(input.dim() > 1, "input needs at least two dimensions")
    need_same_dtype(input=input, smooth_scales=smooth_scales)
    need_shape("smooth_scales", smooth_scales, (input.shape[-1],))
    need_emulated(group_index is None and quant_mode == "pertoken", "only per-token, without groups")
    need_emulated(dst_type in (None, 1), "only int8")
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    return quantise_rows(x)


def npu_quantize(input, scales, zero_points, dtype, axis, div_mode):
    """Static quantisation: rint(input / scales + zero_points), input * scales if ``div_mode`` is False."""
    need_dtype("input", input, torch.float32, torch.float16, torch.bfloat16)
    # In op-plugin 7.2.0 and 7.3.0 it is an operator of the old kind (aclop), which no graph can hold.
    need(not (div_mode and graphs.capturing()), "npu_quantize with div_mode is an aclop, during graph capture")
    if div_mode:
        need_dtype("scales", scales, torch.float32, torch.bfloat16)
        need_dtype("zero_points", zero_points, torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        need(DTYPE_CODES.get(dtype) in (torch.qint8, torch.quint8, torch.int32), "dtype: qint8, quint8, int32")
    else:
        need(not is_inference_card() or axis != -2, "axis -2 does not exist on inference cards")
        need(DTYPE_CODES.get(dtype) in (torch.qint8, torch.quint4x2), "dtype: qint8 or quint4x2")
        need_same_dtype(input=input, scales=scales, zero_points=zero_points)
    need_emulated(DTYPE_CODES[dtype] == torch.qint8, "only qint8")
    need(-input.dim() <= axis < input.dim(), "axis out of range")
    if not div_mode:  # documented: -2 is the last but one, anything above is the last axis
        axis = -2 if axis == -2 else -1
    shape = [1] * input.dim()
    for name, tensor in (("scales", scales), ("zero_points", zero_points)):
        need_shape(name, tensor, (1,), (input.shape[axis],))
    shape[axis] = -1
    scale = scales.float().view(shape if scales.numel() > 1 else [1] * input.dim())
    x = input.float() / scale if div_mode else input.float() * scale
    if zero_points is not None:
        x = x + zero_points.float().view(shape if zero_points.numel() > 1 else [1] * input.dim())
    return torch.round(x).clamp(-128, 127).to(torch.int8)


def npu_trans_quant_param(scale, offset, round_mode):
    """float32 [n] -> int64 [n] holding a 19-bit float in the low word, a 9-bit offset above, and a mark."""
    need_dtype("scale", scale, torch.float32)
    need_dtype("offset", offset, torch.float32)
    need_emulated(round_mode == 0, "only truncation (round_mode 0)")
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFE000
    packed = bits | (1 << 46)
    if offset is not None:
        level = torch.round(offset).clamp(-256, 255).to(torch.int64) & 0x1FF
        packed = packed | (level << 37)
    return packed


def unpack_quant_param(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 from npu_trans_quant_param -> float32 scale (19 significant bits) and float32 offset."""
    word = packed & 0xFFFFFFFF
    scale = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).view(torch.float32)
    level = (packed >> 37) & 0x1FF
    return scale, torch.where(level >= 256, level - 512, level).float()


def _check_combination(scale, offset, pertoken_scale, bias, output) -> None:
    """The documented table of dtypes that may occur together (int8 operands)."""
    wide_bias = (torch.int32, torch.bfloat16, torch.float32)
    if output == torch.bfloat16:
        need_dtype("scale with bfloat16 output", scale, torch.float32, torch.bfloat16)
        need_dtype("bias", bias, *wide_bias)
    elif output == torch.float16 and pertoken_scale is not None:
        need_dtype("scale with per-token float16 output", scale, torch.float32)
        need_dtype("bias", bias, torch.int32, torch.float32)
    elif output == torch.int32:
        need_dtype("scale with int32 output", scale, torch.float32, torch.bfloat16)
        need_dtype("bias", bias, torch.int32)
        need(pertoken_scale is None, "int32 output takes no pertoken_scale")
    else:
        need_dtype("scale", scale, torch.float32, torch.int64)
        need_dtype("bias", bias, torch.int32)
        need(pertoken_scale is None, "int8 output takes no pertoken_scale")
    need(offset is None or output == torch.int8, "offset goes with int8 output only")


def _check_weight(x2) -> None:
    transposed = x2.transpose(-1, -2).is_contiguous()
    need(x2.is_contiguous() or transposed, "x2 is neither contiguous nor the transpose of a contiguous tensor")
    if is_fractal(x2) and is_inference_card():
        need(
            transposed,
            "inference cards want FRACTAL_NZ made of the transposed [n, k] weight, passed as its .t()",
        )


def npu_quant_matmul(
    x1,
    x2,
    scale,
    offset,
    pertoken_scale,
    bias,
    output_dtype,
    x1_dtype,
    x2_dtype,
    pertoken_scale_dtype,
    scale_dtype,
    group_sizes,
    y_scale,
):
    """int8 [..., m, k] @ int8 [k, n], scaled per column (and per row) -> [..., m, n] of ``output_dtype``.

    int32 output is the bare accumulator plus bias: ``scale`` must be given and is not applied (engines pass
    it again to npu_dequant_swiglu_quant). Without ``pertoken_scale``, float16 and int8 outputs go through the
    19-bit scale of npu_trans_quant_param whichever dtype it is given in.
    """
    output = torch.int8 if output_dtype is None else DTYPE_CODES.get(output_dtype)
    card = is_inference_card()
    allowed = (torch.int8, torch.float16) if card else (torch.int8, torch.float16, torch.bfloat16, torch.int32)
    need(output in allowed, f"output_dtype {output} is not one of {allowed}")
    need_emulated(x1.dtype == x2.dtype == torch.int8, "only int8 operands")
    need(not (card and pertoken_scale is not None), "inference cards have no pertoken_scale")
    need(x1.shape[-1] <= LAST_DIMENSION and x2.shape[-1] <= LAST_DIMENSION, "a last dimension exceeds 65535")
    need(min(x1.numel(), x2.numel(), scale.numel()) > 0, "x1, x2 and scale may not be empty")
    need_emulated(x2.dim() == 2 and group_sizes is None and y_scale is None, "only one ungrouped weight matrix")
    _check_combination(scale, offset, pertoken_scale, bias, output)
    n = x2.shape[-1]
    need_shape("scale", scale, (1,), (n,))
    need_shape("offset", offset, (1,), (n,))
    need_shape("bias", bias, (n,))
    need_dtype("pertoken_scale", pertoken_scale, torch.float32)
    need_shape("pertoken_scale", pertoken_scale, (x1.shape[-2],))
    _check_weight(x2)

    total = int8_matmul(x1.reshape(-1, x1.shape[-1]).contiguous(), x2.t().contiguous())
    total = total.view(*x1.shape[:-1], n)
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    if output == torch.int32:
        return total
    level = 0.0 if offset is None else offset.float()
    if scale.dtype == torch.int64 or (pertoken_scale is None and output in (torch.float16, torch.int8)):
        packed = scale if scale.dtype == torch.int64 else npu_trans_quant_param(scale, None, 0)
        scale, packed_level = unpack_quant_param(packed)
        level = packed_level if offset is None else level
    result = total.float() * scale.float()
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        result = result + bias.float()
    if output == torch.int8:
        return torch.round(result + level).clamp(-128, 127).to(torch.int8)
    return result.to(output)
