"""Linear layers, one class per precision, all with the same call: [tokens, in] (float or Quantized) -> [tokens, out].

The decoder does not branch on precision: it asks `activation_quant` how a layer wants its input and hands that to
the op before it, which may fuse the quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.backends.base import ActivationQuant, Backend, Quantized
from quasar.checkpoints.weights import FullWeights, Int8Weights, LinearWeights
from quasar.errors import QuasarError

_ROWS = 8192  # quantised at a time


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
        static_offset: float = 0.0,
        input_bias: Tensor | None = None,
    ) -> None:
        """values int8 [out, in]; scale float32 [out]; bias [out]; static_scale float32 [1] or None.

        static_offset and input_bias [in], which is added to the input, come from checkpoints that others have smoothed
        (see Int8Weights and AscendFolder.norm_bias). Backends need not know them: such a layer takes its input in
        floating point and quantises it here.
        """
        super().__init__()
        self.backend, self.static_offset = backend, static_offset
        self.static_scale = None if static_scale is None else static_scale.to(backend.device)
        self.input_bias = None if input_bias is None else input_bias.to(backend.device, torch.float32)
        plain = static_offset == 0 and input_bias is None
        self.activation_quant = ActivationQuant(self.static_scale) if plain else None
        self.packed = backend.int8_weight(values, scale)
        self.bias = None if bias is None else bias.to(backend.device, torch.float32)
        self.nbytes = values.nbytes + scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def from_full(cls, linear: FullLinear) -> W8A8Linear:
        """Quantises an unpacked full-precision layer."""
        return cls.of(linear.backend, quantize_linear(linear))

    @classmethod
    def of(cls, backend: Backend, weights: Int8Weights) -> W8A8Linear:
        """The layer that holds these weights."""
        w = weights
        return cls(backend, w.values, w.scale, w.bias, w.static_scale, w.static_offset)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Tensor):
            x = self._quantize(x)
        return self.backend.int8_linear(x, self.packed, self.bias)

    def _quantize(self, x: Tensor) -> Quantized:
        if self.input_bias is not None:
            x = (x.float() + self.input_bias).to(x.dtype)
        if self.static_scale is None or self.static_offset == 0:
            return self.backend.quantize(x, ActivationQuant(self.static_scale))
        values = (x.float() / self.static_scale + self.static_offset).round().clamp(-128, 127).to(torch.int8)
        return Quantized(values, self.static_scale)


def fused_linear(
    backend: Backend, names: Sequence[str], parts: Sequence[LinearWeights], input_bias: Tensor | None = None
) -> Linear:
    """One layer from projections `names` of the same input, fused along their outputs.

    input_bias [in] is added to that input. Raises QuasarError where the parts do not have one precision: one product
    cannot compute them, and vLLM and vLLM-Ascend refuse such checkpoints too.
    """
    full = [part for part in parts if isinstance(part, FullWeights)]
    int8 = [part for part in parts if isinstance(part, Int8Weights)]
    if full and int8:
        kinds = ", ".join(
            f"{name} {'W8A8' if isinstance(part, Int8Weights) else 'full precision'}"
            for name, part in zip(names, parts, strict=True)
        )
        raise QuasarError(f"{kinds}: projections of one input must have the same precision")

    def on_device(tensors: Sequence[Tensor]) -> Tensor:
        """Fused where they end up: the checkpoint's pages are read once and not copied on the host."""
        moved = [backend.place(tensor) for tensor in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    bias = None
    if any(part.bias is not None for part in parts):
        bias = on_device([torch.zeros(_rows(part)) if part.bias is None else part.bias for part in parts])
    if full:
        weight = on_device([part.weight for part in full])
        if input_bias is not None:  # W (x + b) = W x + W b
            moved = weight.float() @ input_bias.to(backend.device, torch.float32)
            bias = moved if bias is None else bias.float() + moved
        return FullLinear(backend, weight, bias)
    statics = [part.static_scale for part in int8 if part.static_scale is not None]
    offsets = {part.static_offset for part in int8}
    equal = all(torch.equal(scale, statics[0]) for scale in statics)
    if len(statics) not in (0, len(int8)) or len(offsets) > 1 or (offsets != {0} and not equal):
        raise QuasarError(f"{', '.join(names)}: projections of one input must quantise it the same way")
    return W8A8Linear(
        backend,
        on_device([part.values for part in int8]),
        on_device([part.scale for part in int8]),
        bias,
        # Symmetric scales that differ: the largest clips nothing, and is what vLLM takes.
        torch.stack(statics).amax(dim=0) if statics else None,
        offsets.pop(),
        input_bias,
    )


def _rows(part: LinearWeights) -> int:
    return len(part.weight if isinstance(part, FullWeights) else part.values)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in], float32 [out]: symmetric, scale = max|row| / 127 (1 for a row of zeros)."""
    # In blocks of rows: a whole lm_head in float32, several times over, would be the peak of everything's memory.
    blocks = [_quantize_rows(rows.float()) for rows in weight.split(_ROWS)]
    return torch.cat([values for values, _ in blocks]), torch.cat([scale for _, scale in blocks])


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    peak = rows.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_linear(linear: FullLinear, static_scale: Tensor | None = None) -> Int8Weights:
    """An unpacked full-precision layer in int8."""
    values, scale = quantize_weight(linear.weight)
    return Int8Weights(values, scale, linear.bias, static_scale)
