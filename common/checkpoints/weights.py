"""What a model's weights are: plain data that checkpoints give and quantisers change. No device code runs here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class FullWeights:
    """A projection in floating point: weight [out, in], bias [out] or None.

    hadamard [block, block] is not None where the layer has to rotate its input first, block by block.
    """

    weight: Tensor
    bias: Tensor | None
    hadamard: Tensor | None = None


@dataclass(frozen=True)
class Int8Weights:
    """A W8A8 projection: values int8 [out, in], scale float32 [out], bias [out] or None.

    static_scale float32 [1] is None for dynamic activations. Static ones may be asymmetric: x8 = x / static_scale +
    static_offset, rounded; what the offset adds to the products (offset * sum of a row of values) the bias takes off.
    input_bias float32 [in] is added to the input before it is quantised. wide: the input keeps 12 bits, as two int8
    digits (files call it W8A16).
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    static_scale: Tensor | None = None
    static_offset: float = 0.0
    input_bias: Tensor | None = None
    wide: bool = False


@dataclass(frozen=True)
class Int4Weights:
    """A projection with int4 weights in groups along the inputs: weight = values * scale + offset.

    values int8 [out, in] between -8 and 7; scale bfloat16 [out, in / group]; offset likewise, None where all are 0
    (symmetric groups). Where a format knows whole zero points alone, offset is -zero * scale, rounded to bfloat16. bias
    [out] or None. hadamard as in FullWeights.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None
    hadamard: Tensor | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[1] // self.scale.shape[1]


INT4_GROUPS = (128, 64, 32)  # inputs that share a scale of int4 weights; what the kernels take


LinearWeights = FullWeights | Int8Weights | Int4Weights

# The linear layers of a decoder layer, in the order they run. q, k and v are one layer, gate and up another.
LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norms are [hidden], q_norm and k_norm [head_dim] or None; q, k and v are stacked along the
    outputs in qkv, gate and up in gate_up."""

    index: int
    input_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: LinearWeights
    o: LinearWeights
    post_norm: Tensor
    gate_up: LinearWeights
    down: LinearWeights

    def linears(self) -> dict[str, LinearWeights]:
        """The four linear layers by name."""
        return {name: getattr(self, name) for name in LINEARS}

    def convert(self, change: dict[str, LinearWeights]) -> LayerWeights:
        """The same layer with some linear layers replaced."""
        return replace(self, **change)


@dataclass(frozen=True)
class HeadWeights:
    """What follows the last layer: the norm [hidden], and lm_head."""

    norm: Tensor
    lm_head: LinearWeights


@dataclass
class ModelWeights:
    """A whole model in memory. Readers of checkpoints offer the same three methods and read when they are asked."""

    table: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    top: HeadWeights

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self.table

    def layer(self, index: int) -> LayerWeights:
        """The decoder layer at this place."""
        return self.layers[index]

    def head(self, embedding: Tensor) -> HeadWeights:
        """The last norm and lm_head; embedding is what `embedding()` gave."""
        return self.top

    def __iter__(self) -> Iterator[LayerWeights]:
        return iter(self.layers)
