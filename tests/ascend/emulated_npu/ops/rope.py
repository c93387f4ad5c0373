"""Rotary position embedding in the "half" layout."""

import torch

from emulated_npu.limits import is_inference_card, need, need_dtype, need_emulated, need_same_dtype

UNIFIED_BUFFER = 192 * 1024  # bytes of on-core memory on Atlas A2


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    rotated = x.float() * cos.float() + torch.cat((-second, first), -1) * sin.float()
    return rotated.to(x.dtype)


def npu_rotary_mul(input, r1, r2, rotary_mode, rotate):
    """x [B, S, N, D] (or BNSD, SBND, TND), cos and sin broadcast over heads -> rotated x, a new tensor."""
    need_dtype("input", input, torch.float32, torch.float16, torch.bfloat16)
    need_same_dtype(input=input, r1=r1, r2=r2)
    need_emulated(rotary_mode == "half" and rotate is None, 'only rotary_mode "half"')
    head = input.shape[-1]
    need(input.dim() in (3, 4) and r1.dim() == input.dim(), "input, r1 and r2 need 3 or 4 dimensions alike")
    need(r1.shape == r2.shape and r1.shape[-1] == head, "r1 and r2 need one shape, ending in input's head size")
    need(all(r in (1, x) for r, x in zip(r1.shape, input.shape, strict=True)), "r1 does not broadcast to input")
    need(head % 2 == 0 and head < 896, f"head size {head} must be even and below 896")
    if is_inference_card():
        need(input.dim() == 4 and head == 128, "inference cards rotate 4-dimensional input of head size 128")
    return _rotate(input, r1, r2)


def npu_apply_rotary_pos_emb(query, key, cos, sin, layout, rotary_mode):
    """Rotate query and key IN PLACE and return them: BSND (cos [B, S, 1, D]) or TND (cos [T, 1, D])."""
    need_dtype("query", query, torch.float32, torch.float16, torch.bfloat16)
    need_same_dtype(query=query, key=key, cos=cos, sin=sin)
    need(layout in ("BSND", "TND"), f"layout {layout}: BSND or TND")
    need(rotary_mode == "half", 'rotary_mode must be "half"')
    dims = 4 if layout == "BSND" else 3
    head = query.shape[-1]
    need(all(t.dim() == dims for t in (query, key, cos, sin)), f"{layout} wants {dims} dimensions everywhere")
    need(head in (64, 128), f"head size {head}: 64 or 128")
    need(
        query.shape[:-2] == key.shape[:-2] and key.shape[-1] == head,
        "query and key differ beyond their heads",
    )
    need(cos.shape == sin.shape == (*query.shape[:-2], 1, head), "cos and sin need query's shape with one head")
    heads, width = query.shape[-2] + key.shape[-2], query.element_size()
    cast = query.dtype == torch.bfloat16
    work = 4 if cast else width
    used = heads * 128 * work * 4 + 128 * width * 4 + heads * 128 * work + cast * 128 * 8
    need(used <= UNIFIED_BUFFER, f"{heads} heads need {used} bytes of on-core memory")
    query.copy_(_rotate(query, cos, sin))
    key.copy_(_rotate(key, cos, sin))
    return query, key
