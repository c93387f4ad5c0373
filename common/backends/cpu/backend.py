"""The fast CPU backend: the C kernels of common/backends/cpu, at the speed memory allows.

Row-invariant as the reference is: every kernel computes a token's row in an order that depends on that row alone, so
windows need not be taken apart. Full-precision weights stay as the checkpoint has them: bfloat16 is widened in
registers, which reads half the bytes of float32 and multiplies the very same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, CapturedPass, Forward, Quantized, Slot
from quasar.backends.cpu import kernels
from quasar.backends.cpu.recording import RecordedPass, pass_key, segments_of
from quasar.backends.cpu.slot import CpuSlot
from quasar.backends.reference import ReferenceBackend

_HEAD_STEP = 16  # the attention kernels take head sizes that are multiples of it


def _has_kernel(head_dim: int) -> bool:
    return head_dim % _HEAD_STEP == 0 and head_dim <= kernels.KV_MOST_DIM


class CpuBackend(ReferenceBackend):
    name = "cpu"

    def __init__(self, kv: str = "float32") -> None:
        """kv: what keys and values are kept in, one of kernels.KV_FORMATS."""
        super().__init__("cpu", torch.float32)
        self.kv = kv

    def full_weight(self, weight: Tensor) -> Any:
        if weight.dtype == torch.bfloat16:
            return kernels.PackedBf16(weight.contiguous())
        return kernels.PackedFloat32(weight.float().contiguous())

    def int8_weight(self, values: Tensor, scale: Tensor) -> Any:
        return kernels.PackedInt8(values.contiguous(), scale)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return kernels.float_linear(x.contiguous(), weight, bias)

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        scale, tokens = x.scale, x.values.shape[0]
        if scale.shape[0] != tokens:  # one for all of them, quantised elsewhere
            scale = scale.expand(tokens).contiguous()
        return kernels.int8_linear(x.values, scale, weight, bias)

    def wide_int8_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return kernels.wide_int8_linear(x.contiguous(), weight, bias)

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Any:
        offset = None if offset is None else offset.contiguous()
        return kernels.PackedInt4(values.contiguous(), scale.contiguous(), offset)

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        return kernels.int4_linear((x.values, x.scale) if isinstance(x, Quantized) else x, weight, bias)

    def quantize_int4(self, x: Tensor) -> Quantized:
        return Quantized(*kernels.quantize_per_token(x, limit=7))

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        return kernels.hadamard(x, len(hadamard))

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is not None:
            return Quantized(*kernels.quantize_static(x, quant.static_scale))
        return Quantized(*kernels.quantize_per_token(x))

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        if table.dtype not in (torch.bfloat16, torch.float32):
            return super().embed(table, ids)
        return kernels.embed(table, ids)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        # The kernels add the residual to x in place: x is the previous layer's output and nobody else's.
        x = x.contiguous()
        if quant is not None and quant.static_scale is None:
            return Quantized(*kernels.add_rms_norm_quantize(x, residual, weight, eps)), x
        y = kernels.add_rms_norm(x, residual, weight, eps)
        return (y if quant is None else self.quantize(y, quant)), x

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        if quant is not None and quant.static_scale is None:
            return Quantized(*kernels.swiglu_quantize(gate_up))
        y = kernels.swiglu(gate_up)
        return y if quant is None else self.quantize(y, quant)

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], batch: Batch
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """The whole tables: the kernel looks positions up. Called once per pass: segments are read here."""
        if not _has_kernel(specs[0].head_dim):
            return super().rope_rows(cos, sin, specs, batch)
        batch.on_device = segments_of(batch, batch.on_device)
        return [(cos, sin)] * len(specs)

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, batch: Batch, layer: int
    ) -> Tensor:
        if not _has_kernel(spec.head_dim):
            return super().append_rotated(qkv, spec, cos, sin, batch, layer)
        return kernels.rope_qk_append(
            qkv, cos, sin, batch.on_device, layer, spec.heads, spec.head_dim, spec.q_norm, spec.k_norm, spec.eps
        )

    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        if not _has_kernel(spec.head_dim):
            return super().attention(q, spec, batch, layer)
        return kernels.attention(q, batch.on_device, layer, spec.kv_heads, spec.head_dim**-0.5)

    def kept(self, x: Tensor, batch: Batch) -> Tensor:
        if batch.on_device is None:
            return super().kept(x, batch)
        return kernels.keep_rows(x, batch.on_device, len(batch.kept_rows))

    def argmax(self, logits: Tensor) -> Tensor:
        return kernels.argmax(logits)

    cheap_top_k = True

    def top_k(self, logits: Tensor, k: int) -> Tensor:
        return kernels.top_k(logits, k)

    def new_slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> Slot:
        if not _has_kernel(head_dim):
            return super().new_slot(layers, kv_heads, capacity, head_dim)
        return CpuSlot(layers, kv_heads, capacity, head_dim, self.kv)

    @contextmanager
    def exact_kv(self) -> Iterator[None]:
        asked, self.kv = self.kv, "float32"
        try:
            yield
        finally:
            self.kv = asked

    def kv_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        if not _has_kernel(head_dim):
            return super().kv_bytes(layers, kv_heads, head_dim)
        return kernels.kv_bytes(layers, kv_heads, head_dim, self.kv)

    def pass_key(self, batch: Batch) -> Hashable | None:
        return pass_key(batch)

    def capture(self, forward: Forward, batch: Batch) -> CapturedPass:
        return RecordedPass(forward, batch)


class CpuBfloat16Backend(CpuBackend):
    """`--dtype bfloat16`: inputs of full-precision linear layers are rounded to bfloat16, and so are their weights.

    Processors that multiply bfloat16 do so at twice the speed of float32, which long prompts gain from; the sums are
    float32. Everything else (norms, attention, KV cache, int8) stays float32 too, and so is `dtype`. Row-invariant as
    CpuBackend is: rounding depends on the row alone, and passes of any length take the same kernel.
    """

    name = "cpu bfloat16"

    @property
    def linear_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def full_weight(self, weight: Tensor) -> kernels.PackedBf16:
        return kernels.PackedBf16(weight.bfloat16().contiguous())

    def linear(self, x: Tensor, weight: kernels.PackedBf16, bias: Tensor | None) -> Tensor:
        return kernels.bf16_linear(x.contiguous(), weight, bias)
