"""int4 weights: packing eight into an int32, and their product with 16-bit activations."""

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

LARGEST = 65535  # k and n, and m of a transposed x
IN_A_WORD = 8
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def npu_convert_weight_to_int4pack(weight, inner_k_tiles):
    """int32 [rows, columns] between -8 and 7 -> int32 [rows, columns / 8], the first of eight in the lowest bits.

    The package packs on the host, so it has no place in a captured graph.
    """
    need_training_card("npu_convert_weight_to_int4pack")
    need(not graphs.capturing(), "npu_convert_weight_to_int4pack packs on the host, during graph capture")
    need_dtype("weight", weight, torch.int32)
    need(weight.dim() == 2, "weight needs two dimensions")
    need(weight.shape[1] % IN_A_WORD == 0, "the last dimension must be a multiple of 8")
    need(bool(((weight >= -8) & (weight <= 7)).all()), "a value lies outside int4")
    need_emulated(inner_k_tiles == 0 and not is_fractal(weight), "only row-major weights, inner_k_tiles 0 (reserved)")
    nibbles = (weight & 0xF).to(torch.int64).unflatten(1, (-1, IN_A_WORD)) << _SHIFTS
    words = nibbles.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8] -> int32 [rows, columns] between -8 and 7."""
    nibbles = (words.unsqueeze(-1) >> _SHIFTS) & 0xF
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(1)


def _is_transposed(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.dim() == 2 and tensor.t().is_contiguous()


def npu_weight_quant_batchmatmul(
    x,
    weight,
    antiquant_scale,
    antiquant_offset,
    quant_scale,
    quant_offset,
    bias,
    antiquant_group_size,
    inner_precise,
    weight_dtype,
):
    """x fp16/bf16 [m, k] @ ((int4 [k, n] + offset) * scale) + bias -> [m, n] of x's type.

    The weight comes packed, int32 [k, n / 8], or [k / 8, n] as the transpose of a packed [n, k] one.
    scale [k / group, n]; with group 0 [n] or [1, n], or [1] for the whole tensor. offset as scale.
    """
    need_dtype("x", x, torch.float16, torch.bfloat16)
    need_dtype("weight", weight, torch.int8, *(() if is_inference_card() else (torch.int32,)))
    need_emulated(weight.dtype == torch.int32 and weight_dtype is None, "only int4 weights in int32")
    need_emulated(quant_scale is None and quant_offset is None, "only outputs that are not quantised")
    need(not is_fractal(weight), "a FRACTAL_NZ weight goes with compiled graphs only, not with single calls")
    need_emulated(inner_precise == 0, "only inner_precise 0: the other wants FRACTAL_NZ")
    need(x.dim() == weight.dim() == 2, "x and weight need two dimensions")
    operands = {"x": x, "weight": weight, "antiquant_scale": antiquant_scale, "antiquant_offset": antiquant_offset}
    for name, tensor in operands.items():
        straight = tensor is None or tensor.is_contiguous() or _is_transposed(tensor)
        need(straight, f"{name} is neither contiguous nor a transpose")
    values = unpacked(weight.t()).t() if _is_transposed(weight) else unpacked(weight)
    (m, k), n = x.shape, values.shape[1]
    need(min(m, k, n) > 0, "x and weight may not be empty")
    need(values.shape[0] == k, f"x has {k} columns, weight {values.shape[0]} rows")
    need(max(k, n, m if _is_transposed(x) else 0) <= LARGEST, "a dimension exceeds 65535")

    group = antiquant_group_size
    need_same_dtype(x=x, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    need_shape("antiquant_offset", antiquant_offset, tuple(antiquant_scale.shape))
    if group == 0:
        need_shape("antiquant_scale", antiquant_scale, (1,), (n,), (1, n))
    else:
        need(32 <= group < k and group % 32 == 0, f"antiquant_group_size {group}: a multiple of 32 from 32 to k - 1")
        need_shape("antiquant_scale", antiquant_scale, (-(-k // group), n))
    need_dtype("bias", bias, torch.float32 if x.dtype == torch.bfloat16 else torch.float16)
    need_shape("bias", bias, (n,), (1, n))

    def of_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double().repeat_interleave(group, 0)[:k] if group else tensor.double()

    offset = 0.0 if antiquant_offset is None else of_rows(antiquant_offset)
    product = x.double() @ ((values + offset) * of_rows(antiquant_scale))
    return (product if bias is None else product + bias.double()).to(x.dtype)
