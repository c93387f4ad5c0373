"""The reference backend with Ascend's rounding: the oracle for ids, in plain PyTorch, without torch_npu.

The NPU computes in bfloat16 or float16, and its fused operators round in fewer places than the reference backend's
single steps do. Two correct implementations that round differently need not say the same tokens: where two logits are
nearly equal, the last bit decides. So ids are compared with this: the reference backend, each step rounded where the
operator's documentation says it is, and everything between two roundings exact (float64). How far this is from the
reference backend itself, op by op and in ids, is tested beside it (test_npu_backend.py, test_npu_ids.py).

The differences, all of them:

    add_rms_norm    bfloat16: the sum is normalised before it is rounded. Before int8 the norm is not rounded to the
                    activations' type; elsewhere it is rounded before the weight is applied, and after
    quantize        values are multiplied by 127 / max, not divided by max / 127; a static scale is the reciprocal of
                    one that was rounded to the activations' type
    swiglu          silu(gate) is not rounded before the product, nor the product before it is quantised
    append_rotated  cos and sin (and, with q and k norms, their products with the norms' weights) are rounded to the
                    activations' type; the norm is rounded before its weight is applied, not after
    attention       scores and probabilities are not rounded, the output is, once
    linear          the sum is exact, with the bias, and rounded once (the reference sums in float32)
    int4_linear     the same; scales, offsets (counted in steps, before the scale is applied) and, with float16, the
                    bias are of the activations' type. int4 activations: the sum is rounded before their scale and the
                    bias are applied, and again after
    rotate          the sum is exact and rounded once
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, Quantized, Segment
from quasar.backends.reference import ReferenceBackend


class FusedRounding(ReferenceBackend):
    name = "reference with Ascend's rounding"

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        y = x.double() @ weight.double().t()
        return (y if bias is None else y + bias.double()).to(self.dtype)

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        values, scale = weight
        y = self.int8_matmul(x.values, values).float() * scale * x.scale[:, None]
        return (y if bias is None else y + bias).to(self.dtype)

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        grouped = values.double().unflatten(1, (scale.shape[1], -1))
        if offset is not None:
            steps = offset.float() / scale.float()
            is_whole = (steps.round() * scale.float()).bfloat16() == offset  # as whole zero points are stored
            steps[is_whole] = steps[is_whole].round()
            grouped = grouped + steps.to(self.dtype).double()[..., None]
        return (grouped * scale.to(self.dtype).double()[..., None]).flatten(1)

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        if isinstance(x, Quantized):
            y = self.linear(x.values, weight, None).float() * x.scale[:, None]
            return (y if bias is None else y + bias).to(self.dtype)
        return self.linear(x, weight, bias if bias is None or self.dtype == torch.bfloat16 else bias.half())

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        return (x.double().view(-1, len(hadamard)) @ hadamard.double()).view(x.shape).to(self.dtype)

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        x = x.float()
        if quant.static_scale is None:
            # A row of zeros has scale 0 on the NPU and 1 in the reference; its product is 0 either way.
            peak = x.abs().amax(dim=-1)
            values = torch.where(peak[:, None] > 0, (x * (127 / peak)[:, None]).round(), 0.0)
            return Quantized(values.to(torch.int8), peak / 127)
        factor = (1 / quant.static_scale).to(self.dtype).float()  # which comes in the activations' type
        values = (x * factor).round().clamp(-128, 127)  # npu_quantize clips at -128
        return Quantized(values.to(torch.int8), 1 / factor)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        alone = residual is None
        if alone:
            total = x.float()
        elif self.dtype == torch.bfloat16:
            total = x.float() + residual.float()
        else:
            total = (x + residual).float()
        normed, residual = _normed(total, eps), total.to(self.dtype)
        if quant is not None and quant.static_scale is None:
            return self.quantize(normed * weight.float(), quant), residual
        if not alone:  # npu_add_rms_norm; npu_rms_norm, at a text's first norm, rounds once
            normed = normed.to(self.dtype).float()
        y = (normed * weight.float()).to(self.dtype)
        return (y if quant is None else self.quantize(y, quant)), residual

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        gate, up = gate_up.float().chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
        if quant is not None and quant.static_scale is None:
            return self.quantize(y, quant)
        y = y.to(self.dtype)
        return y if quant is None else self.quantize(y, quant)

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, batch: Batch, layer: int
    ) -> Tensor:
        rows = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = rows.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        k = self._turned(k, spec.k_norm, spec, cos, sin)
        for segment, first in zip(batch.segments, batch.first_rows, strict=False):
            slot, last = segment.slot, first + len(segment.ids)
            written = slice(slot.length, slot.length + len(segment.ids))
            slot.k[layer, :, written] = k[first:last].transpose(0, 1)
            slot.v[layer, :, written] = v[first:last].transpose(0, 1)
        return self._turned(q, spec.q_norm, spec, cos, sin)

    def _turned(self, x: Tensor, norm: Tensor | None, spec: AttentionSpec, cos: Tensor, sin: Tensor) -> Tensor:
        """x [tokens, heads, head_dim]"""
        cos, sin = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))
        if norm is not None:
            peak = max(spec.q_norm.abs().max().item(), spec.k_norm.abs().max().item())
            power = 2.0 ** math.ceil(math.log2(peak))
            x = (_normed(x, spec.eps) * power).to(self.dtype)
            weight = norm.float() / power
            cos, sin = cos * weight, sin * weight.roll(spec.head_dim // 2)
        cos, sin = cos.to(self.dtype).float(), sin.to(self.dtype).float()
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(self.dtype)

    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        return torch.cat(
            [
                self._attended(q[first : first + len(segment.ids)], spec, segment, layer)
                for segment, first in zip(batch.segments, batch.first_rows, strict=False)
            ]
        )

    def _attended(self, q: Tensor, spec: AttentionSpec, segment: Segment, layer: int) -> Tensor:
        tokens, slot = len(q), segment.slot
        k, v = (
            half[layer, :, : slot.length + tokens].double().repeat_interleave(spec.heads // spec.kv_heads, 0)
            for half in (slot.k, slot.v)
        )
        scores = q.transpose(0, 1).double() @ k.transpose(1, 2) * spec.head_dim**-0.5
        hidden = torch.ones(tokens, slot.length + tokens, dtype=torch.bool)
        hidden[:, : slot.length] = False
        for row in range(tokens):
            hidden[row, [slot.length + ancestor for ancestor in segment.path(row)]] = False
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v  # [heads, tokens, head_dim]
        return y.transpose(0, 1).reshape(tokens, -1).to(self.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    """float32, without the weight."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
