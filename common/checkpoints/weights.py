"""What a projection's weights are, as a checkpoint holds them: plain data, no device and no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FullWeights:
    """A projection as a checkpoint holds it: weight [out, in], bias [out] or None, floating point."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Int8Weights:
    """A W8A8 projection as a checkpoint holds it: values int8 [out, in], scale float32 [out], bias [out] or None.

    static_scale float32 [1] is None for dynamic activations. Static ones may be asymmetric: x8 = x / static_scale +
    static_offset, rounded; what the offset adds to the products (offset * sum of a row of values) the bias takes off.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    static_scale: Tensor | None = None
    static_offset: float = 0.0


LinearWeights = FullWeights | Int8Weights
