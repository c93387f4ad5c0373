"""Linear layers that run, one class per precision, all with the same call: [tokens, in] (float or Quantized) ->
[tokens, out].

Each is made from plain weights, which it puts into the device's own layout at once. The decoder does not branch on
precision: it asks `activation_quant` how a layer wants its input and hands that to the op before it, which may fuse
the quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quasar.backends.base import ActivationQuant, Backend, Quantized
from quasar.checkpoints.weights import FullWeights, Int8Weights


class Linear(nn.Module):
    """y = x W^T + b. Subclasses hold W in one precision; `nbytes` is what one pass reads of it."""

    activation_quant: ActivationQuant | None = None
    nbytes: int


class FullLinear(Linear):
    """Full precision. Rotates its input first where the weights say so. `stored_as` is the checkpoint's type."""

    def __init__(self, backend: Backend, weights: FullWeights) -> None:
        super().__init__()
        self.backend = backend
        self.stored_as = weights.weight.dtype
        self.packed = backend.full_weight(backend.place(weights.weight))
        self.bias = None if weights.bias is None else weights.bias.to(backend.device, backend.dtype)
        self.hadamard = None if weights.hadamard is None else weights.hadamard.to(backend.device, backend.dtype)
        self.nbytes = self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.hadamard is not None:
            x = self.backend.rotate(x, self.hadamard)
        return self.backend.linear(x, self.packed, self.bias)


class W8A8Linear(Linear):
    """int8 weights, one scale per output channel; int8 activations, one scale per token (or a calibrated one).

    A wide layer's activations keep 12 bits, as two int8 digits; most backends make those in the product itself. Static
    offsets and input biases come from checkpoints that others have smoothed. Backends need not know these: such layers
    take their input in floating point and quantise it here.
    """

    def __init__(self, backend: Backend, weights: Int8Weights) -> None:
        super().__init__()
        w, device = weights, backend.device
        self.backend = backend
        self.static_offset = w.static_offset
        self.static_scale = None if w.static_scale is None else w.static_scale.to(device)
        self.input_bias = None if w.input_bias is None else w.input_bias.to(device, torch.float32)
        self.wide = w.wide
        plain = w.static_offset == 0 and w.input_bias is None and (backend.fuses_digits or not w.wide)
        self.activation_quant = ActivationQuant(self.static_scale, w.wide) if plain else None
        self.packed = backend.int8_weight(backend.place(w.values), backend.place(w.scale))
        self.bias = None if w.bias is None else w.bias.to(device, torch.float32)
        self.nbytes = w.values.nbytes + w.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if self.input_bias is not None:
            assert isinstance(x, Tensor)  # what comes before it quantises plain inputs alone
            x = (x.float() + self.input_bias).to(x.dtype)
        if self.wide:
            return self.backend.wide_int8_linear(x, self.packed, self.bias)
        if isinstance(x, Tensor):
            x = self._quantize(x)
        return self.backend.int8_linear(x, self.packed, self.bias)

    def _quantize(self, x: Tensor) -> Quantized:
        if self.static_scale is None or self.static_offset == 0:
            return self.backend.quantize(x, ActivationQuant(self.static_scale))
        values = (x.float() / self.static_scale + self.static_offset).round().clamp(-128, 127).to(torch.int8)
        return Quantized(values, self.static_scale)
