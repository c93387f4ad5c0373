"""The reference backend: CPU, plain PyTorch. It defines the numbers; every other backend is tested against it.

Rows are computed one by one where PyTorch's kernels would otherwise round differently for different numbers of rows,
so a token's logits never depend on which other tokens shared its pass. That is what makes speculative and batched
output equal plain decoding bit for bit rather than almost always.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Batch, Quantized

_EXACT_INPUTS = 1024  # as many products of int8 numbers as float32 adds up without rounding


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [tokens, in] by int8 [out, in] -> int32 [tokens, out], exact on every processor."""
    if x.device.type != "cpu" or int_mm_is_exact():
        return torch._int_mm(x, weight.t())
    blocks = zip(x.split(_EXACT_INPUTS, dim=1), weight.split(_EXACT_INPUTS, dim=1), strict=True)
    sums = [(part.float() @ w.float().t()).to(torch.int32) for part, w in blocks]
    return torch.stack(sums).sum(dim=0, dtype=torch.int32)


@cache
def int_mm_is_exact() -> bool:
    """Whether oneDNN's int8 products are. Without VNNI it adds pairs of products in 16 bits, which saturate."""
    x = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(x, x.t()) == 256 * 127**2).all())


class ReferenceBackend(Backend):
    name = "reference"
    int4_offsets = True

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.dtype = dtype

    def full_weight(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.dtype)

    def int8_weight(self, values: Tensor, scale: Tensor) -> Any:
        return values.to(self.device), scale.to(self.device)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return torch.cat([F.linear(row, weight, bias) for row in x.split(1)])

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        values, scale = weight
        accumulator = self.int8_matmul(x.values, values)
        y = accumulator.float() * x.scale[:, None] * scale
        return (y if bias is None else y + bias).to(self.dtype)

    def wide_int8_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        values, scale = weight
        digits = self.digits(x)
        upper, lower = self.int8_matmul(digits.values, values).chunk(2)
        y = (16 * upper + lower).float() * digits.scale[len(x) :, None] * scale
        return (y if bias is None else y + bias).to(self.dtype)

    def int8_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """int8 [tokens, in] by int8 [out, in] -> int32 [tokens, out], exact."""
        return int8_matmul(x, weight)

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Any:
        if self.device.type == "meta":  # where checkpoints are looked at, shapes alone
            return values, scale, offset
        if self.device.type != "cpu":
            return super().int4_weight(values, scale, offset)
        # The kernel counts from 0 to 15 and wants (scale, offset) pairs [in / group, out, 2].
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((values.int() + 8).contiguous(), 1)
        offset = torch.zeros_like(scale) if offset is None else offset
        pairs = torch.stack([scale.t(), offset.t()], dim=-1).contiguous()
        return packed, values.shape[1] // scale.shape[1], pairs

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        # In bfloat16, since PyTorch's kernel is vectorised in no other type; int4 values are exact in it.
        values = x.values if isinstance(x, Quantized) else x
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(values.bfloat16(), *weight).float()
        if isinstance(x, Quantized):
            y = y * x.scale[:, None]
        return (y if bias is None else y + bias).to(self.dtype)

    def quantize_int4(self, x: Tensor) -> Quantized:
        x = x.float()
        peak = x.abs().amax(dim=-1)
        scale = torch.where(peak > 0, peak / 7, 1.0)
        return Quantized((x / scale[:, None]).round().clamp(-7, 7).to(torch.int8), scale)

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        block = len(hadamard)
        return torch.stack([(row.view(-1, block) @ hadamard).flatten() for row in x])

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        x = x.float()
        if quant.static_scale is None:
            peak = x.abs().amax(dim=-1)
            scale = torch.where(peak > 0, peak / 127, 1.0)
        else:
            scale = quant.static_scale
        # A static scale clips, and at -128, as in vLLM and npu_quantize; a dynamic one never reaches it.
        values = (x / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
        return Quantized(values, scale)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        residual = x if residual is None else x + residual
        y = _rms_norm(residual, weight, eps)
        return (y if quant is None else self.quantize(y, quant)), residual

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        gate, up = gate_up.chunk(2, dim=-1)
        y = F.silu(gate) * up
        return y if quant is None else self.quantize(y, quant)

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, batch: Batch, layer: int
    ) -> Tensor:
        tokens = qkv.shape[0]
        q, k, v = qkv.view(tokens, -1, spec.head_dim).split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if spec.q_norm is not None and spec.k_norm is not None:
            q, k = _rms_norm(q, spec.q_norm, spec.eps), _rms_norm(k, spec.k_norm, spec.eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        for segment, first in zip(batch.segments, batch.first_rows, strict=False):
            slot, last = segment.slot, first + len(segment.ids)
            positions = slice(slot.length, slot.length + len(segment.ids))
            slot.k[layer, :, positions] = k[first:last].transpose(0, 1)
            slot.v[layer, :, positions] = v[first:last].transpose(0, 1)
        return q

    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        rows = []
        for segment, first in zip(batch.segments, batch.first_rows, strict=False):
            slot = segment.slot
            for row in range(len(segment.ids)):
                seen = [*range(slot.length), *(slot.length + ancestor for ancestor in segment.path(row))]
                keys, values = (memory[layer][:, torch.tensor(seen)] for memory in (slot.k, slot.v))
                rows.append(_attend_row(q[first + row], keys, values))
        return torch.stack(rows)


def _attend_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [heads, head_dim]; k, v [kv_heads, length, head_dim], all of it visible -> [heads * head_dim]."""
    kv_heads, _, head_dim = k.shape
    q = q.reshape(kv_heads, -1, head_dim)  # [kv_heads, group, head_dim]
    scores = (q @ k.transpose(1, 2)).float() * head_dim**-0.5
    return (scores.softmax(dim=-1).to(v.dtype) @ v).flatten()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float32 (float64 for float64 input)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] by cos, sin [tokens, head_dim / 2]: rope, "half" layout (RoFormer, as in Llama)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
