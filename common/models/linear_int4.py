"""int4 weights, under 16-bit activations (W4A16) or int4 ones (W4A4): two views of one copy, which is what QSpec drafts
and verifies with (arXiv 2410.11305)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import Backend, Quantized
from quasar.checkpoints.weights import Int4Weights
from quasar.models.linear import Linear


class W4A16Linear(Linear):
    """int4 weights in groups along the inputs, one scale each; activations stay in 16 bits.

    `hadamard` [block, block] rotates the input first, where that could not be folded into the layer before.
    """

    def __init__(
        self, backend: Backend, packed: Any, nbytes: int, bias: Tensor | None, hadamard: Tensor | None = None
    ) -> None:
        """packed: what `backend.int4_weight` made; nbytes: of weights, scales and bias; bias float32 [out]."""
        super().__init__()
        self.backend = backend
        self.packed = packed
        self.nbytes = nbytes
        self.bias = bias
        self.hadamard = hadamard

    @classmethod
    def of(cls, backend: Backend, weights: Int4Weights) -> W4A16Linear:
        """The layer that holds these weights."""
        w = weights
        bias = None if w.bias is None else w.bias.to(backend.device, torch.float32)
        nbytes = w.values.numel() // 2 + w.scale.nbytes + (0 if bias is None else bias.nbytes)
        if w.offset is not None:
            nbytes += w.offset.nbytes
        offset = () if w.offset is None else (backend.place(w.offset),)
        packed = backend.int4_weight(backend.place(w.values), backend.place(w.scale), *offset)
        hadamard = None if w.hadamard is None else w.hadamard.to(backend.device, backend.dtype)
        return cls(backend, packed, nbytes, bias, hadamard)

    @classmethod
    def over(cls, other: W4A16Linear) -> W4A16Linear:
        """A layer of this class around the weights of another."""
        return cls(other.backend, other.packed, other.nbytes, other.bias, other.hadamard)

    def forward(self, x: Tensor) -> Tensor:
        if self.hadamard is not None:
            x = self.backend.rotate(x, self.hadamard)
        return self.backend.int4_linear(self._activations(x), self.packed, self.bias)

    def _activations(self, x: Tensor) -> Tensor | Quantized:
        return x


class W4A4Linear(W4A16Linear):
    """The same weights; activations int4, one scale per token."""

    def _activations(self, x: Tensor) -> Quantized:
        return self.backend.quantize_int4(x)


def in_w4a4(linear: Linear) -> Linear:
    """A layer with int4 weights under int4 activations; any other as it is."""
    return W4A4Linear.over(linear) if isinstance(linear, W4A16Linear) else linear
