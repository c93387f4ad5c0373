"""The Backend contract: everything a decoder asks of a device, and nothing about models or drafts.

A backend is free to fuse (an RMSNorm may quantise its output, attention may append to the cache first), so
the contract is cut where devices fuse, not where textbooks cut. Shapes use these names:

    tokens      new positions in this pass (1 for a plain step, gamma + 1 for a verification window)
    in, out     features of a linear layer
    heads, kv_heads, head_dim, capacity    attention and its cache
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quasar.errors import QuasarError
from torch import Tensor


@dataclass(frozen=True)
class ActivationQuant:
    """How a linear layer wants its input: symmetric int8.

    static_scale: None for one scale per token, computed on the fly; a float32 [1] tensor for one calibrated
    scale per tensor.
    """

    static_scale: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """Quantised activations: `values` int8 [tokens, in] times `scale` float32 [tokens] (or [1] if static).

    int4 activations come in int8 too, between -7 and 7.
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: head counts, scale, and the per-head RMSNorms of q and k where there are any."""

    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    eps: float


class KVCache:
    """Keys and values of one sequence, preallocated; only committed positions count.

    A pass writes at positions length .. length + tokens - 1; `commit(n)` keeps the first n of them. What is not
    committed is overwritten by the next pass and never attended to, so rolling a rejected draft back costs nothing.
    """

    def __init__(
        self, layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.layer_k, self.layer_v = self.k.unbind(), self.v.unbind()  # the same memory, a tensor for each layer
        self.capacity = capacity
        self.length = 0

    def rewind(self, length: int) -> None:
        """Keep only the first `length` positions. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} positions: {self.length} are in use")
        self.length = length

    def commit(self, tokens: int) -> None:
        """Keep `tokens` more positions. Raises ValueError beyond the capacity."""
        if not 0 <= tokens <= self.capacity - self.length:
            raise ValueError(f"cannot commit {tokens} positions: {self.length} of {self.capacity} are in use")
        self.length += tokens

    @property
    def free(self) -> int:
        """Positions that are left."""
        return self.capacity - self.length


# The decoder's call: ids [tokens], cache, keep -> logits [keep, vocab] of the last `keep` positions.
Forward = Callable[[Tensor, KVCache, int], Tensor]
# A verification window: ids on the host, keep -> logits [keep, vocab] on the device, valid until the next window.
WindowPass = Callable[[Sequence[int], int], Tensor]


class Backend(ABC):
    """One device. `dtype` is the floating-point type that activations and the KV cache have on it."""

    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def linear_dtype(self) -> torch.dtype:
        """What full-precision products round their inputs to, and what `get_backend` takes for this backend."""
        return self.dtype

    # Weights: given in checkpoint layout once, kept in whatever form the device reads fastest.

    def place(self, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor on this device, in its own type where the device has it."""
        return tensor.to(self.device)

    @abstractmethod
    def full_weight(self, weight: Tensor) -> Any:
        """Takes a float weight [out, in]; returns the handle that `linear` wants."""

    @abstractmethod
    def int8_weight(self, values: Tensor, scale: Tensor) -> Any:
        """Takes int8 [out, in] and float32 [out]; returns the handle that `int8_linear` wants."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in] -> [tokens, out], full precision."""

    @abstractmethod
    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in] int8 -> [tokens, out] of `dtype`: int32 accumulation, one rescale, then the bias."""

    # int4, where the device has it: the other precisions do not need it.

    def int4_weight(self, values: Tensor, scale: Tensor) -> Any:
        """Takes int8 [out, in] between -8 and 7 and bfloat16 [out, in / group], group 32, 64 or 128; returns the
        handle that `int4_linear` wants. Raises QuasarError where the device has no kernel for it."""
        where = "cpu, cuda and Atlas A2 and A3"
        raise QuasarError(f"int4 weights run on {where}; --device {self.device.type} has --precision full and w8a8")

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in], 16-bit or int4, -> [tokens, out] of `dtype`."""
        raise NotImplementedError

    def quantize_int4(self, x: Tensor) -> Quantized:
        """[tokens, in] -> int4, scale = max|row| / 7 per token (1 for a row of zeros), round half to even."""
        raise NotImplementedError

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        """[tokens, in], each block of in times `hadamard` [block, block]."""
        raise NotImplementedError

    # Everything between the matmuls.

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` [tokens] of `table` [vocab, hidden] -> [tokens, hidden] of `dtype`."""
        return table[ids].to(self.dtype)

    @abstractmethod
    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        """[tokens, in] -> int8. Per token: scale = max|row| / 127 (1 for a row of zeros), round half to even.

        Static: the same with the given scale, clamped to -128 .. 127.
        """

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        """Adds [tokens, hidden] to the residual stream and normalises the sum.

        Returns (normalised, quantised if the next layer wants it so; the new residual stream).
        """

    @abstractmethod
    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        """[tokens, 2 * intermediate], gate first -> silu(gate) * up."""

    @abstractmethod
    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, cache: KVCache, layer: int
    ) -> Tensor:
        """Splits [tokens, (heads + 2 * kv_heads) * head_dim], norms q and k per head if the model does, rotates
        them by cos, sin [tokens, head_dim / 2] ("half" layout), writes k and v behind the committed positions.

        cos and sin may also come as this backend's `rope_rows` made them. Returns q [tokens, heads, head_dim].
        """

    @abstractmethod
    def attention(self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int) -> Tensor:
        """Causal attention of a window: row i sees the committed positions and the window's first i + 1.

        Returns [tokens, heads * head_dim].
        """

    def attend(
        self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int, quant: ActivationQuant | None
    ) -> Tensor | Quantized:
        """`attention`, quantised if the next layer wants it so."""
        y = self.attention(q, spec, cache, layer)
        return y if quant is None else self.quantize(y, quant)

    def argmax(self, logits: Tensor) -> Tensor:
        """[tokens, vocab] -> int64 [tokens], the first of equals."""
        return logits.argmax(dim=-1)

    # Once per pass.

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], cache: KVCache, tokens: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """What `append_rotated` takes as cos and sin for the next `tokens` positions, a pair for each layer.

        cos, sin [positions, head_dim / 2] are the decoder's whole tables and `specs` its layers. A device may lay the
        rows out for its rotation, fold a layer's q and k norms into them, or look positions up on the device.
        """
        rows = slice(cache.length, cache.length + tokens)
        return [(cos[rows], sin[rows])] * len(specs)

    def window_pass(self, forward: Forward, cache: KVCache) -> WindowPass:
        """How verification windows of one sequence run: here, as any pass does.

        A device that pays for each kernel launch captures a graph for each window size instead. The caller commits.
        """

        def run(ids: Sequence[int], keep: int) -> Tensor:
            return forward(torch.tensor(ids, device=self.device), cache, keep)

        return run

    def logits(self, lm_head: Callable[[Any], Tensor], x: Tensor | Quantized) -> Tensor:
        """`lm_head` of x [tokens, hidden] -> float32 [tokens, vocab] (float64 for float64).

        A device whose matmul accumulates in float32 may leave out the rounding to `dtype` in between.
        """
        logits = lm_head(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    # The device itself.

    def require_memory(self, nbytes: int, what: str) -> None:
        """Raises QuasarError unless `nbytes` are free for `what`; called before they are used, where that is known."""
        return

    def new_cache(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> KVCache:
        """An empty cache on this device."""
        return KVCache(layers, kv_heads, capacity, head_dim, self.dtype, self.device)

    def synchronize(self) -> None:
        """Waits until the device has finished; a no-op where calls are synchronous. For clocks."""
        return
