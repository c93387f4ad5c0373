"""The backend for Atlas inference cards (Ascend 310P): float16, one calibrated scale per tensor, plain attention.

These chips have no per-token scale in their int8 matmul, no bfloat16, and none of the fused quantising operators. Their
int8 matmul takes the product of weight and activation scale packed into an int64 (19 significant bits), and an int32
bias in units of that product.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, Quantized, Segment, Slot
from quasar.errors import QuasarError
from quasar_npu.backend import NpuBackend
from quasar_npu.places import Places, hidden_from, to_device
from quasar_npu.weights import Int8Part, bias_of, int8_parts, joined

_ROTARY_HEAD = 128  # the one head size that npu_rotary_mul takes here


class _CardWeight:
    """The parts of an int8 layer, and their scales once the layer's static activation scale is known."""

    def __init__(self, parts: list[Int8Part]) -> None:
        self.parts = parts
        self.packed: list[tuple[Tensor, Tensor | None]] = []  # int64 scale [out], int32 bias [out], of each part


class InferenceCardBackend(NpuBackend):
    name = "npu (inference card)"
    dtypes = (torch.float16,)
    graphs = False  # plain windows: capture is documented for A2 and A3
    int4_offsets = False

    def place(self, tensor: Tensor) -> Tensor:
        # Cast on the host: the chip has no bfloat16, not even to cast from.
        return (tensor.half() if tensor.dtype == torch.bfloat16 else tensor).to(self.device)

    def int8_weight(self, values: Tensor, scale: Tensor) -> _CardWeight:
        return _CardWeight(int8_parts(values.to(self.device), scale.to(self.device), transposed=True))

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        if not weight.packed:
            weight.packed = [self._packed(part, x.scale, bias_of(part, bias)) for part in weight.parts]
        return joined(
            [
                self.ops.npu_quant_matmul(x.values, part.values, scale, bias=part_bias, output_dtype=torch.float16)
                for part, (scale, part_bias) in zip(weight.parts, weight.packed, strict=True)
            ]
        )

    def _packed(self, part: Int8Part, static_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        product = part.scale * static_scale
        units = None if bias is None else (bias / product).round().to(torch.int32)
        return self.ops.npu_trans_quant_param(product), units

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> NoReturn:
        raise QuasarError(f"{self.soc} has no int4 weights (Atlas A2 and A3 do); use --precision w8a8 or full")

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is None:
            raise QuasarError(
                f"{self.soc} has no scales per token; quantise with one per tensor (quasar quantize --scheme "
                "w8a8-static), or run --precision full"
            )
        return self._quantize_static(x, quant.static_scale)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        y, total = super().add_rms_norm(x, residual, weight, eps, None)
        return (y if quant is None else self.quantize(y, quant)), total

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        gate, up = gate_up.chunk(2, dim=-1)
        y = F.silu(gate) * up
        return y if quant is None else self.quantize(y, quant)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if x.shape[-1] == _ROTARY_HEAD:
            return super()._rotate(x, cos, sin)
        cos, sin = cos.view(x.shape), sin.view(x.shape)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    # Keys and values: each sequence has memory of its own, written by copies of slices, since the chip has no scatter.

    def new_slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> Slot:
        return Slot(layers, kv_heads, capacity, head_dim, self.dtype, self.device)

    def _begin(self, batch: Batch) -> Places:
        segment = batch.segments[0]
        chain = len(batch.segments) == 1 and segment.parents is None
        positions = None if chain else to_device(torch.tensor(batch.positions, dtype=torch.int32), self.device)
        self._passes[batch] = Places(positions, segment.slot.length, ()), None
        return self._passes[batch][0]

    def _append(self, keys: Tensor, values: Tensor | None, batch: Batch, layer: int, spec: AttentionSpec) -> None:
        if values is None:
            keys, values = keys.chunk(2)
        for segment, first in zip(batch.segments, batch.first_rows, strict=False):
            slot, count = segment.slot, len(segment.ids)
            where = slice(slot.length, slot.length + count)
            for memory, rows in ((slot.k, keys), (slot.v, values)):
                new = rows.view(batch.rows, spec.kv_heads, -1)[first : first + count]
                memory[layer, :, where] = new.transpose(0, 1)

    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        parts = [
            self._attend_segment(q[first : first + len(segment.ids)], spec, segment, layer)
            for segment, first in zip(batch.segments, batch.first_rows, strict=False)
        ]
        return joined(parts, dim=0)

    def _attend_segment(self, q: Tensor, spec: AttentionSpec, segment: Segment, layer: int) -> Tensor:
        slot, tokens = segment.slot, q.shape[0]
        end = slot.length + tokens
        keys, values = slot.k[layer, :, :end], slot.v[layer, :, :end]
        # [kv_heads, group * tokens, head_dim]: a kv head serves its group in one product.
        grouped = q.transpose(0, 1).reshape(spec.kv_heads, -1, spec.head_dim)
        scores = (grouped @ keys.transpose(1, 2)).float() * spec.head_dim**-0.5
        if segment.parents is None:
            hidden = torch.ones(tokens, end, dtype=torch.bool, device=self.device).triu(slot.length + 1)
        else:
            hidden = to_device(hidden_from(segment, end), self.device)
        scores = scores.view(spec.heads, tokens, end).masked_fill(hidden, -torch.inf)
        probs = scores.softmax(dim=-1).to(self.dtype).view(spec.kv_heads, -1, end)
        return (probs @ values).view(spec.heads, tokens, -1).transpose(0, 1).reshape(tokens, -1)
