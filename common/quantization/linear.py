"""Linear layers, one class per precision, all with the same call: [tokens, in] (float or Quantized) -> [tokens, out].

The decoder does not branch on precision: it asks `activation_quant` how a layer wants its input and hands that to
the op before it, which may fuse the quantisation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backends.base import ActivationQuant, Backend, Quantized


class Linear(nn.Module):
    """y = x W^T + b. Subclasses hold W in one precision; `nbytes` is what one pass reads of it."""

    activation_quant: ActivationQuant | None = None
    nbytes: int


class FullLinear(Linear):
    """Full precision. `weight` [out, in] stays in checkpoint layout, and may be changed, until `pack`."""

    def __init__(self, backend: Backend, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.backend, self.weight, self.bias = backend, weight, bias
        self.packed: Any = None

    def pack(self) -> None:
        """Gives the weight the device's own layout and lets the checkpoint's copy go."""
        if self.packed is not None:
            return
        self.packed = self.backend.full_weight(self.weight)
        self.bias = None if self.bias is None else self.bias.to(self.backend.dtype)
        self.weight = None
        self.nbytes = self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.backend.linear(x, self.packed, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class W8A8Linear(Linear):
    """int8 weights, one scale per output channel; int8 activations, one scale per token (or a calibrated one)."""

    def __init__(
        self,
        backend: Backend,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        static_scale: Tensor | None = None,
    ) -> None:
        """values int8 [out, in]; scale float32 [out]; bias [out]; static_scale float32 [1] or None."""
        super().__init__()
        self.backend = backend
        self.activation_quant = ActivationQuant(static_scale)
        self.packed = backend.int8_weight(values, scale)
        self.bias = None if bias is None else bias.to(backend.device, torch.float32)
        self.nbytes = values.nbytes + scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def from_full(cls, linear: FullLinear) -> W8A8Linear:
        """Quantises an unpacked full-precision layer."""
        values, scale = quantize_weight(linear.weight)
        return cls(linear.backend, values, scale, linear.bias)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Tensor):
            x = self.backend.quantize(x, self.activation_quant)
        return self.backend.int8_linear(x, self.packed, self.bias)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in], float32 [out]: symmetric, scale = max|row| / 127 (1 for a row of zeros)."""
    weight = weight.float()
    peak = weight.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale
