"""Passes longer than a window, which are bound by arithmetic: PyTorch's own int8 matmul and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_INT_MM_ROWS = 17  # cuBLASLt's int8 matmul wants more than 16 rows ...
_INT_MM_MULTIPLE = 8  # ... and inner and outer sizes that are multiples of 8


def padded_int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [tokens, in] by int8 [out, in] -> int32 [tokens, out], with zeros added until torch._int_mm takes it."""
    tokens, inputs = x.shape
    out = weight.shape[0]
    rows, more_in, more_out = max(_INT_MM_ROWS - tokens, 0), -inputs % _INT_MM_MULTIPLE, -out % _INT_MM_MULTIPLE
    if rows or more_in:
        x = F.pad(x, (0, more_in, 0, rows))
    if more_in or more_out:  # real models' sizes are multiples already
        weight = F.pad(weight, (0, more_in, 0, more_out))
    return torch._int_mm(x, weight.t())[:tokens, :out]


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """q [tokens, heads, head_dim]; k, v [kv_heads, start + tokens, head_dim] -> [tokens, heads * head_dim]."""
    tokens, heads, _ = q.shape
    by_head = q.transpose(0, 1)[None]
    if start == 0:
        y = F.scaled_dot_product_attention(by_head, k[None], v[None], is_causal=True, enable_gqa=True)
    else:
        # PyTorch's fused kernels take a mask or grouped heads, not both; without them the scores would be in memory.
        group = heads // k.shape[0]
        mask = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device).tril(start)
        y = F.scaled_dot_product_attention(
            by_head, k.repeat_interleave(group, 0)[None], v.repeat_interleave(group, 0)[None], attn_mask=mask
        )
    return y[0].transpose(0, 1).reshape(tokens, -1)
