"""SwiGLU, alone and fused with the quantisation of what goes into the down projection."""

import torch

from emulated_npu.limits import need, need_dtype, need_emulated, need_shape, need_training_card
from emulated_npu.ops.quantised import quantise_rows


def _swiglu(x: torch.Tensor, activate_left: bool) -> torch.Tensor:
    left, right = x.float().chunk(2, -1)
    return torch.nn.functional.silu(left) * right if activate_left else torch.nn.functional.silu(right) * left


def npu_swiglu(input, dim):
    """[..., 2h] -> silu(first half) * second half, [..., h]."""
    need_training_card("npu_swiglu")
    need_dtype("input", input, torch.float32, torch.float16, torch.bfloat16)
    need_emulated(dim in (-1, input.dim() - 1), "only the last dimension")
    need(input.numel() > 0 and input.shape[-1] % 2 == 0, "the split dimension must be even")
    return _swiglu(input, True).to(input.dtype)


def npu_swiglu_quant(x, smooth_scales, offsets, group_index, activate_left, quant_mode, group_list_type, dst_type):
    """[..., 2h], 2h <= 8192 -> per-token int8 [..., h] and float32 scale [...]."""
    need_training_card("npu_swiglu_quant")
    need_dtype("x", x, torch.float32, torch.float16, torch.bfloat16)
    need(x.dim() > 1 and x.shape[-1] % 2 == 0, "x needs two dimensions and an even last one")
    need(
        x.shape[-1] <= 8192,
        f"last dimension {x.shape[-1]} exceeds 8192 (npu_dequant_swiglu_quant has no limit)",
    )
    need_emulated(quant_mode == 1 and group_index is None and offsets is None, "only per-token, without groups")
    need_dtype("smooth_scales", smooth_scales, torch.float32)
    need_shape("smooth_scales", smooth_scales, (1, x.shape[-1] // 2), (1,))
    out = _swiglu(x, activate_left)
    return quantise_rows(out if smooth_scales is None else out * smooth_scales)


def npu_dequant_swiglu_quant(
    x,
    weight_scale,
    activation_scale,
    bias,
    quant_scale,
    quant_offset,
    group_index,
    activate_left,
    quant_mode,
    dst_type,
    round_mode,
    activate_dim,
    swiglu_mode,
    clamp_limit,
    glu_alpha,
    glu_bias,
):
    """fp16/bf16 [tokens, 2h], or npu_quant_matmul's int32 and its scales -> int8 [tokens, h], [tokens].

    ``activate_left=True`` puts silu on the first half (the default is the second), ``quant_mode=1`` is
    per-token (the default is static).
    """
    need_training_card("npu_dequant_swiglu_quant")
    need_dtype("x", x, torch.int32, torch.float16, torch.bfloat16)
    need(x.dim() == 2 and x.shape[-1] % 2 == 0, "x must be [tokens, 2h]")
    need_emulated(quant_mode == 1, "only per-token quantisation (quant_mode=1)")
    need_emulated(group_index is None and swiglu_mode == 0, "only one group, standard swiglu")
    need_emulated(dst_type in (None, 1) and round_mode in (None, 0), "only int8, rounded to nearest")
    need(activate_dim in (None, -1, 1), "the last dimension is the one to split")
    tokens, width = x.shape
    need_dtype("weight_scale", weight_scale, torch.float32)
    need_shape("weight_scale", weight_scale, (1, width))
    need_dtype("activation_scale", activation_scale, torch.float32)
    need_shape("activation_scale", activation_scale, (tokens, 1))
    need_dtype("bias", bias, torch.int32)
    need_shape("bias", bias, (width,))
    need_dtype("quant_scale", quant_scale, torch.float32, torch.float16, torch.bfloat16)
    need_shape("quant_scale", quant_scale, (1, width // 2))
    if x.dtype == torch.int32:
        need(activation_scale is not None, "int32 x needs activation_scale")
        need_emulated(weight_scale is not None, "int32 x without weight_scale")
    else:
        need(activation_scale is None and bias is None, "fp16/bf16 x takes neither activation_scale nor bias")
    wide = (x if bias is None else x + bias).float()
    if weight_scale is not None:
        wide = wide * weight_scale
    if activation_scale is not None:
        wide = wide * activation_scale
    out = _swiglu(wide, activate_left)
    return quantise_rows(out if quant_scale is None else out * quant_scale.float())
