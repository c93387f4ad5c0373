"""The Ascend backend for Atlas A2 and A3: torch_npu's fused operators, as few launches per layer as they allow.

At batch 1 a W8A8 layer is bound by launches, not by arithmetic: each costs the host about as long as the device needs
for the whole operator. Per layer and window (tokens > 1; a plain step, tokens = 1, saves the transpose):

    npu_add_rms_norm_dynamic_quant   residual + norm + int8
    npu_quant_matmul                 q, k, v with their biases
    clone                            heads outermost
    (npu_rms_norm)                   q and k together; Qwen3 only
    npu_rotary_mul                   all heads in one launch, see rope.py
    npu_scatter_nd_update_           k and v together (Qwen3: one each)
    npu_fused_infer_attention_score
    npu_dynamic_quant
    npu_quant_matmul                 o
    npu_add_rms_norm_dynamic_quant
    npu_quant_matmul                 gate and up
    npu_dequant_swiglu_quant         silu(gate) * up + int8
    npu_quant_matmul                 down

Where the fused operators round otherwise than the reference backend (each rounds once, at its outputs), it is in
tests/ascend/fused_rounding.py, step by step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quasar.backends.base import (
    ActivationQuant,
    AttentionSpec,
    Backend,
    Forward,
    KVCache,
    Quantized,
    WindowPass,
)
from quasar.errors import QuasarError
from quasar_npu.cache import NpuCache, to_device
from quasar_npu.device import is_inference_card, open_npu
from quasar_npu.graphs import WindowGraphs, graphs_wanted
from quasar_npu.int4 import Int4Weight, int4_packed, quantize_rows_int4
from quasar_npu.rope import LayerGains, RopeTables
from quasar_npu.weights import Int8Part, bias_of, fractal, int8_parts, joined

_PER_TOKEN = 1  # quant_mode of npu_dequant_swiglu_quant
_CAUSAL_TO_BOTTOM_RIGHT = 3  # sparse_mode: the last row sees everything, as a window behind a cache must
_TRIANGLE = 2048  # side of the mask that sparse_mode 3 wants, whatever the lengths


def npu_backend(device: str, dtype: torch.dtype | None) -> NpuBackend:
    """The backend for the chip that "npu" or "npu:1" is; dtype None takes what that chip computes in."""
    place, soc = open_npu(device)
    if is_inference_card(soc):
        from quasar_npu.inference_card import InferenceCardBackend

        return InferenceCardBackend(place, dtype or torch.float16, soc)
    return NpuBackend(place, dtype or torch.bfloat16, soc)


class NpuBackend(Backend):
    name = "npu"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    graphs = True  # capture verification windows

    def __init__(self, device: torch.device, dtype: torch.dtype, soc: str) -> None:
        if dtype not in self.dtypes:
            raise QuasarError(
                f"--dtype {str(dtype)[6:]}: {soc} runs {' and '.join(str(d)[6:] for d in self.dtypes)} only"
            )
        import torch_npu

        self.ops = torch_npu
        self.device, self.dtype, self.soc = device, dtype, soc
        self.graphs = self.graphs and graphs_wanted()
        self._gains: dict[AttentionSpec, LayerGains] = {}
        # Of every decoder in use: a self-drafter's passes come between its verifier's, whose graphs read these tables.
        self._tables = WeakTensorKeyDictionary()  # the decoder's cos -> RopeTables
        self._zeros = torch.zeros(0, 0, dtype=dtype, device=device)
        self._triangle: Tensor | None = None

    # Weights.

    def full_weight(self, weight: Tensor) -> Tensor:
        return fractal(weight.to(self.device, self.dtype).t())  # [in, out]

    def int8_weight(self, values: Tensor, scale: Tensor) -> list[Int8Part]:
        return int8_parts(values.to(self.device), scale.to(self.device))

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        tokens = x.values.shape[0]
        # A static scale holds for every token.
        scale = x.scale if x.scale.shape[0] == tokens else x.scale.expand(tokens).contiguous()
        return joined(
            [
                self.ops.npu_quant_matmul(
                    x.values,
                    part.values,
                    part.scale,
                    pertoken_scale=scale,
                    bias=bias_of(part, bias),
                    output_dtype=self.dtype,
                )
                for part in weight
            ]
        )

    # int4 weights.

    def int4_weight(self, values: Tensor, scale: Tensor) -> Int4Weight:
        return int4_packed(values.to(self.device), scale.to(self.device), self.dtype)

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        if isinstance(x, Quantized):
            # int4 values are exact in 16 bits: the numbers of W4A4, at the speed of W4A16.
            y = self._int4_matmul(x.values.to(self.dtype), weight, None) * x.scale[:, None]
            return (y if bias is None else y + bias).to(self.dtype)
        # The operator's bias is float32 with bfloat16 activations, float16 with float16 ones.
        return self._int4_matmul(x, weight, bias if bias is None or self.dtype == torch.bfloat16 else bias.half())

    def _int4_matmul(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        return self.ops.npu_weight_quant_batchmatmul(
            x, weight.values, weight.scale, bias=bias, antiquant_group_size=weight.group
        )

    def quantize_int4(self, x: Tensor) -> Quantized:
        return quantize_rows_int4(x)

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        return (x.view(-1, len(hadamard)) @ hadamard).view(x.shape)

    # Between the matmuls.

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is None:
            return Quantized(*self.ops.npu_dynamic_quant(x))
        return self._quantize_static(x, quant.static_scale)

    def _quantize_static(self, x: Tensor, scale: Tensor) -> Quantized:
        return Quantized(self.ops.npu_quantize(x, scale, None, torch.qint8, -1, True), scale)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        if quant is not None and quant.static_scale is None:
            other = self._zeros_like(x) if residual is None else residual
            y, _, total, scale, _ = self.ops.npu_add_rms_norm_dynamic_quant(x, other, weight, epsilon=eps)
            return Quantized(y, scale), total
        if residual is None:
            y, total = self.ops.npu_rms_norm(x, weight, eps)[0], x
        else:
            y, _, total = self.ops.npu_add_rms_norm(x, residual, weight, eps)
        return (y if quant is None else self.quantize(y, quant)), total

    def _zeros_like(self, x: Tensor) -> Tensor:
        """What the first layer adds: the fused operator always adds something."""
        if self._zeros.shape[0] < x.shape[0] or self._zeros.shape[1] != x.shape[1]:
            self._zeros = torch.zeros_like(x)
        return self._zeros[: x.shape[0]]

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        if quant is not None and quant.static_scale is None:
            return Quantized(*self.ops.npu_dequant_swiglu_quant(gate_up, activate_left=True, quant_mode=_PER_TOKEN))
        y = self.ops.npu_swiglu(gate_up, dim=-1)
        return y if quant is None else self.quantize(y, quant)

    # Attention.

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], cache: KVCache, tokens: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        tables = self._tables.get(cos)
        if tables is None:
            tables = self._tables[cos] = RopeTables(cos, sin, [self._gains_of(spec) for spec in specs], self.dtype)
        return tables.rows(cache.length, tokens, cache.places(tokens).positions)

    def _gains_of(self, spec: AttentionSpec) -> LayerGains:
        if spec not in self._gains:
            self._gains[spec] = LayerGains(spec, self.device)
        return self._gains[spec]

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, cache: KVCache, layer: int
    ) -> Tensor:
        gains = self._gains_of(spec)
        if cos.dim() == 2:  # plain rows: the caller has not asked rope_rows
            cos, sin = gains.rotations(cos, sin, self.dtype)
        tokens, turning = qkv.shape[0], spec.heads + spec.kv_heads
        by_head = qkv.view(tokens, -1, spec.head_dim).transpose(0, 1).contiguous()  # [heads + 2 * kv_heads, tokens, D]
        rows, slots = cache.rows(layer), cache.places(tokens).slots
        if gains.norm is None:
            turned = self._rotate(by_head, cos, sin)
            self._append(rows, slots, turned[spec.heads :])
        else:
            normed = self.ops.npu_rms_norm(by_head[:turning], gains.norm, spec.eps)[0]
            turned = self._rotate(normed, cos, sin)
            self._append(rows, slots[: spec.kv_heads], turned[spec.heads :])
            self._append(rows, slots[spec.kv_heads :], by_head[turning:])
        return turned[: spec.heads].transpose(0, 1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[heads, tokens, head_dim] by cos, sin [1, heads * tokens, 1, head_dim]."""
        return self.ops.npu_rotary_mul(x.reshape(cos.shape), cos, sin).view(x.shape)

    def _append(self, rows: Tensor, slots: Tensor, new: Tensor) -> None:
        self.ops.npu_scatter_nd_update_(rows, slots, new)

    def attention(self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int) -> Tensor:
        tokens, end = q.shape[0], cache.length + q.shape[0]
        hidden = cache.places(tokens).hidden
        if hidden is not None:
            # A captured graph cannot be told the length in a Python list; it looks at the whole cache, masked.
            where: dict[str, Any] = {"atten_mask": hidden}
        elif tokens == 1:
            where = {"actual_seq_lengths_kv": [end]}
        else:
            where = {
                "actual_seq_lengths_kv": [end],
                "sparse_mode": _CAUSAL_TO_BOTTOM_RIGHT,
                "atten_mask": self._upper_triangle(),
            }
        keys, values = cache.memory[layer]
        out, _ = self.ops.npu_fused_infer_attention_score(
            q.transpose(0, 1).contiguous()[None],  # as append_rotated leaves it: no copy
            keys[None],
            values[None],
            num_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            scale=spec.head_dim**-0.5,
            input_layout="BNSD" if tokens == 1 else "BNSD_BSND",
            **where,
        )
        return out.view(tokens, -1)

    def _upper_triangle(self) -> Tensor:
        if self._triangle is None:
            self._triangle = torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool).triu(1).to(self.device)
        return self._triangle

    # The device itself.

    def new_cache(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> NpuCache:
        return NpuCache(layers, kv_heads, capacity, head_dim, self.dtype, self.device)

    def window_pass(self, forward: Forward, cache: KVCache) -> WindowPass:
        def plain(ids: Sequence[int], keep: int) -> Tensor:
            return forward(to_device(torch.tensor(ids), self.device), cache, keep)

        return WindowGraphs(forward, cache, plain) if self.graphs else plain

    def synchronize(self) -> None:
        torch.npu.synchronize(self.device)
