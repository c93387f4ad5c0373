"""The CUDA backend: Triton kernels for verification windows, captured as CUDA graphs.

At batch 1 a pass costs what reading its weights costs, if nothing else gets in the way. Per layer, for up to 16 tokens:

    add_rms_norm_quantize   residual + norm + int8
    int8_linear             q, k, v with their biases
    append_rotated          norms of q and k, rotation, append to the cache
    window_attention        two kernels: over blocks of keys, then their sum + int8
    int8_linear             o
    add_rms_norm_quantize
    int8_linear             gate and up
    swiglu_quantize         silu(gate) * up + int8
    int8_linear             down

Results of a window lie in reused buffers, so a pass allocates nothing; positions are read from device memory, so a
captured pass serves every position. Longer passes (prompts) are bound by arithmetic and use PyTorch's matmuls and
attention, but in float32, which is for exactness: there they are cut into windows, whose sums are never TF32.
int4 layers run prompts through their own kernel, in taller tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Forward, KVCache, Quantized, WindowPass
from quasar.backends.buffers import Buffers
from quasar.backends.reference import MAX_WINDOW
from quasar_gpu.cache import CachePool, CudaCache, reach_bucket, rounded
from quasar_gpu.device import require_free
from quasar_gpu.graphs import WindowGraphs
from quasar_gpu.kernels import attention as attention_kernels
from quasar_gpu.kernels import int4 as int4_kernels
from quasar_gpu.kernels import linear as linear_kernels
from quasar_gpu.kernels import rows as row_kernels
from quasar_gpu.kernels.launch import use_dependent_launch
from quasar_gpu.prompt import padded_int_mm, prompt_attention

_DEPENDENT_LAUNCH = (9, 0)  # compute capability that has it


class CudaBackend(Backend):
    name = "cuda"
    graphs = True  # capture verification windows

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """device as `open_cuda` returns it; a CPU, under Triton's interpreter, for tests."""
        self.device, self.dtype = device, dtype
        self.graphs = self.graphs and device.type == "cuda"
        self._out_dtype = dtype  # of linear layers; float32 within `logits`
        self._buffers, self._pool = Buffers(device), CachePool(dtype, device)
        on_card = device.type == "cuda"
        self.dependent_launch = on_card and torch.cuda.get_device_capability(device) >= _DEPENDENT_LAUNCH

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """For a result with shape[0] rows."""
        if shape[0] <= MAX_WINDOW:
            return self._buffers.take(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    # Weights.

    def full_weight(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.dtype).contiguous()

    def int8_weight(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return values.to(self.device).contiguous(), scale.to(self.device, torch.float32).contiguous()

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        if x.shape[0] > MAX_WINDOW and self.dtype != torch.float32:
            return F.linear(x, weight, bias)
        out = self._new((x.shape[0], weight.shape[0]), self._out_dtype)
        for rows, results in zip(x.split(MAX_WINDOW), out.split(MAX_WINDOW), strict=True):
            linear_kernels.float_linear(rows, weight, bias, results)
        return out

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        (values, weight_scale), (rows, scale) = weight, (x.values, x.scale)
        if rows.shape[0] > MAX_WINDOW:
            y = padded_int_mm(rows, values).float() * scale[:, None] * weight_scale
            return (y if bias is None else y + bias).to(self._out_dtype)
        if scale.shape[0] != rows.shape[0]:  # one for all of them
            scale = self._new(rows.shape[:1], torch.float32).copy_(scale)
        out = self._new((rows.shape[0], values.shape[0]), self._out_dtype)
        linear_kernels.int8_linear(rows, scale, values, weight_scale, bias, out)
        return out

    def logits(self, lm_head: Callable[[Any], Tensor], x: Tensor | Quantized) -> Tensor:
        self._out_dtype = torch.float32
        try:
            return super().logits(lm_head, x)
        finally:
            self._out_dtype = self.dtype

    # int4.

    def int4_weight(self, values: Tensor, scale: Tensor) -> int4_kernels.Int4Weight:
        return int4_kernels.pack_int4(values.to(self.device), scale.to(self.device))

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        values, scale = (x.values, x.scale) if isinstance(x, Quantized) else (x, None)
        out = self._new((values.shape[0], weight.values.shape[0]), self._out_dtype)
        int4_kernels.int4_linear(values, scale, weight, bias, out)
        return out

    def quantize_int4(self, x: Tensor) -> Quantized:
        y = self._quantized(x.shape)
        row_kernels.quantize(x, y.values, y.scale, row_kernels.INT4)
        return y

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        out = self._new(x.shape, x.dtype)
        int4_kernels.rotate(x, hadamard, out)
        return out

    # Between the matmuls.

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        out = self._new((ids.shape[0], table.shape[1]), self.dtype)
        row_kernels.embed(table, ids, out)
        return out

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is not None:
            return self._quantize_static(x, quant.static_scale)
        y = self._quantized(x.shape)
        row_kernels.quantize(x, y.values, y.scale)
        return y

    def _quantized(self, shape: tuple[int, ...]) -> Quantized:
        return Quantized(self._new(shape, torch.int8), self._new(shape[:1], torch.float32))

    def _quantize_static(self, x: Tensor, scale: Tensor) -> Quantized:
        # PyTorch's own operators: only checkpoints made elsewhere have static scales.
        scaled = torch.div(x, scale, out=self._new(x.shape, torch.float32))
        y = self._quantized(x.shape)
        y.values.copy_(scaled.round_().clamp_(-128, 127))
        y.scale.copy_(scale)
        return y

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        total = x if residual is None else self._new(x.shape, self.dtype)
        if quant is not None and quant.static_scale is None:
            quantized = self._quantized(x.shape)
            row_kernels.add_rms_norm_quantize(x, residual, weight, eps, total, quantized.values, quantized.scale)
            return quantized, total
        y = self._new(x.shape, self.dtype)
        row_kernels.add_rms_norm(x, residual, weight, eps, total, y)
        return (y if quant is None else self.quantize(y, quant)), total

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        shape = (gate_up.shape[0], gate_up.shape[1] // 2)
        if quant is not None and quant.static_scale is None:
            quantized = self._quantized(shape)
            row_kernels.swiglu_quantize(gate_up, quantized.values, quantized.scale)
            return quantized
        y = self._new(shape, self.dtype)
        row_kernels.swiglu(gate_up, y)
        return y if quant is None else self.quantize(y, quant)

    # Attention.

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], cache: KVCache, tokens: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        # Every pass begins here. Triton launches on the current card, and there may be several, of several kinds.
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        use_dependent_launch(self.dependent_launch)
        return [(cos, sin)] * len(specs)  # whole: the kernel looks its positions up

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, cache: KVCache, layer: int
    ) -> Tensor:
        tokens = qkv.shape[0]
        if cache.length and cos.shape[0] == tokens:  # plain rows: the caller has not asked rope_rows
            cos, sin = (F.pad(rows, (0, 0, cache.length, 0)) for rows in (cos, sin))
        q = self._new((tokens, spec.heads, spec.head_dim), self.dtype)
        attention_kernels.append_rotated(
            qkv,
            cache.start,
            cos,
            sin,
            spec.q_norm,
            spec.k_norm,
            spec.eps,
            cache.layer_k[layer],
            cache.layer_v[layer],
            q,
        )
        return q

    def attention(self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int) -> Tensor:
        tokens, end = q.shape[0], cache.length + q.shape[0]
        k, v = cache.layer_k[layer], cache.layer_v[layer]
        if tokens > MAX_WINDOW and self.dtype != torch.float32:
            return prompt_attention(q, k[:, :end], v[:, :end], cache.length)
        reach = reach_bucket(end)
        out = self._new((tokens, spec.heads * spec.head_dim), self.dtype)
        for first in range(0, tokens, MAX_WINDOW):  # once, but for prompts in float32
            rows, window = q[first : first + MAX_WINDOW], out[first : first + MAX_WINDOW]
            start = cache.start + first if first else cache.start
            partials = self._partials(rows, reach)
            attention_kernels.window_attention(rows, k, v, start, spec.head_dim**-0.5, window, partials, reach)
        return out

    def attend(
        self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int, quant: ActivationQuant | None
    ) -> Tensor | Quantized:
        tokens = q.shape[0]
        if tokens > MAX_WINDOW or quant is None or quant.static_scale is not None:
            return super().attend(q, spec, cache, layer, quant)
        reach, shape = reach_bucket(cache.length + tokens), (tokens, spec.heads * spec.head_dim)
        y = self._quantized(shape)
        attention_kernels.window_attention_quantize(
            q,
            cache.layer_k[layer],
            cache.layer_v[layer],
            cache.start,
            spec.head_dim**-0.5,
            self._new(shape, self.dtype),
            self._partials(q, reach),
            reach,
            y.values,
            y.scale,
        )
        return y

    def _partials(self, q: Tensor, reach: int) -> Tensor:
        return self._buffers.take(attention_kernels.attention_partials_shape(*q.shape, reach), torch.float32)

    # The device itself.

    def require_memory(self, nbytes: int, what: str) -> None:
        if self.device.type == "cuda":
            require_free(self.device, nbytes, what)

    def new_cache(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> CudaCache:
        size = (layers, kv_heads, capacity, head_dim)
        memory = self._pool.idle(*size)
        if memory is None:
            nbytes = 2 * layers * kv_heads * rounded(capacity) * head_dim * self.dtype.itemsize
            self.require_memory(nbytes, f"a KV cache for {capacity} tokens")
            memory = self._pool.allocate(*size)
        return CudaCache(memory, capacity)

    def window_pass(self, forward: Forward, cache: KVCache) -> WindowPass:
        if self.graphs:
            return WindowGraphs(forward, cache)

        def plain(ids: Sequence[int], keep: int) -> Tensor:
            on_device = cache.write_window(ids) if len(ids) <= MAX_WINDOW else torch.tensor(ids, device=self.device)
            return forward(on_device, cache, keep)

        return plain

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
