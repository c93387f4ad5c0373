"""int4 weights, under 16-bit activations (W4A16) or int4 ones (W4A4): two views of one copy, which is what QSpec drafts
and verifies with (arXiv 2410.11305)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import Backend, Quantized
from quasar.errors import QuasarError
from quasar.models.linear import FullLinear, Linear


class W4A16Linear(Linear):
    """int4 weights in groups along the inputs, one scale each; activations stay in 16 bits.

    `hadamard` [block, block] rotates the input first, where that could not be folded into the layer before.
    """

    def __init__(
        self, backend: Backend, packed: Any, nbytes: int, bias: Tensor | None, hadamard: Tensor | None = None
    ) -> None:
        """packed: what `backend.int4_weight` made; nbytes: of weights, scales and bias; bias float32 [out]."""
        super().__init__()
        self.backend, self.packed, self.nbytes = backend, packed, nbytes
        self.bias, self.hadamard = bias, hadamard

    @classmethod
    def from_full(cls, linear: FullLinear, hadamard: Tensor | None = None) -> W4A16Linear:
        """Quantises an unpacked full-precision layer whose weight expects the input times `hadamard` already."""
        values, scale = quantize_weight_int4(linear.weight)
        bias = None if linear.bias is None else linear.bias.to(linear.backend.device, torch.float32)
        nbytes = values.numel() // 2 + scale.nbytes + (0 if bias is None else bias.nbytes)
        return cls(linear.backend, linear.backend.int4_weight(values, scale), nbytes, bias, hadamard)

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


def quantize_weight_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] between -7 and 7, bfloat16 [out, in / group]: symmetric, per group of 128 inputs
    (64 or 32 where 128 does not divide them).

    Each group's scale is the one of a few below max / 7 with the least squared error: clipping the largest weight a
    little makes all others finer. Raises QuasarError for shapes that the int4 kernels do not take.
    """
    out, inputs = weight.shape
    group = next((g for g in (128, 64, 32) if inputs % g == 0), None)
    if group is None or out % 16:
        raise QuasarError(
            f"a linear layer of {inputs} inputs and {out} outputs cannot be int4: multiples of 32 and 16 can; "
            "use --precision w8a8"
        )
    grouped = weight.float().view(out, -1, group)
    peak = grouped.abs().amax(dim=-1)
    best_error = torch.full_like(peak, torch.inf)
    values, scale = torch.zeros_like(grouped, dtype=torch.int8), torch.ones_like(peak, dtype=torch.bfloat16)
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        tried = torch.where(peak > 0, peak * clip / 7, 1.0).bfloat16()
        rounded = (grouped / tried.float()[..., None]).round().clamp(-7, 7)
        error = (rounded * tried.float()[..., None] - grouped).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, tried, scale)
        values = torch.where(better[..., None], rounded.to(torch.int8), values)
    return values.view(out, inputs), scale
