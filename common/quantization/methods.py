"""The ways to make a model smaller. Each takes plain weights and gives plain weights, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from quasar.backends.base import Backend
from quasar.checkpoints.weights import FullWeights, HeadWeights, LayerWeights, LinearWeights
from quasar.models.build import WeightSource
from quasar.models.config import ModelConfig
from quasar.quantization.calibration import InputStats
from quasar.quantization.int4 import lies_on_grid, to_int4
from quasar.quantization.rotation import Rotation
from quasar.quantization.rounding import static_scale, to_int8, to_int8_gptq
from quasar.quantization.smoothquant import fitted_scales, published_scales, smooth_layer

FITTED = "fitted"
SEARCH_ROWS = 256  # sampled inputs per linear layer for a search over smoothing scales


class Method:
    """Full precision in, full precision out: what the others change parts of.

    sample and moments say what `layer` needs to know of a layer's inputs (see InputStats).
    """

    precision = "full"
    calibrates = False  # whether `layer` looks at inputs at all
    sample = 0
    moments = False
    wide: frozenset[str] = frozenset()  # linear layers, lm_head among them, whose int8 weights run under 12-bit inputs

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def check(self, backend: Backend) -> None:
        """Raises QuasarError where the device cannot run what the method makes, before anything is done."""

    def embedding(self, table: Tensor) -> Tensor:
        """[vocab, hidden]."""
        return table

    def prepare(self, layer: LayerWeights) -> LayerWeights:
        """What changes a layer's form and not its function; inputs are observed behind it."""
        return layer

    def adapt(self, prepared: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        """What changes a layer's form and not its function, by the inputs that were seen. stats become those of the
        adapted layer."""
        return prepared

    def round(self, adapted: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        """The quantised layer."""
        return adapted

    def head(self, head: HeadWeights) -> HeadWeights:
        """The last norm and lm_head."""
        return head


class W8A8(Method):
    """Smoothing, then int8. alpha is SmoothQuant's, None searches it per layer, FITTED fits scales to a model of the
    rounding noise; smooth False leaves it out. rounding: "gptq", or "nearest". static gives activations one scale per
    tensor, from the peaks seen.

    wide: linear layers whose inputs keep 12 bits, as two int8 digits. Those are not smoothed: there is nothing to move
    into the weights, which are rounded the better for it."""

    precision = "w8a8"
    calibrates = True

    def __init__(
        self,
        config: ModelConfig,
        alpha: float | str | None = 0.5,
        static: bool = False,
        smooth: bool = True,
        rounding: str = "nearest",
        keep: Iterable[tuple[int, str]] = (),
        wide: Iterable[str] = (),
    ) -> None:
        """keep: (layer, linear layer) pairs that stay in the checkpoint's precision."""
        super().__init__(config)
        self._keep = frozenset(keep)
        self.wide = frozenset(wide)
        fitted = alpha == FITTED
        self._scales = None
        if smooth:
            self._scales = fitted_scales(config) if fitted else published_scales(config, alpha)
        self._static = static
        self.sample = SEARCH_ROWS if smooth and (alpha is None or fitted) else 0
        self.moments = rounding == "gptq"

    def adapt(self, prepared: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        if self._scales is None:
            return prepared
        return smooth_layer(prepared, stats, self._smoothing, self.config)

    def _smoothing(self, name: str, weight: Tensor, seen: InputStats) -> Tensor:
        assert self._scales is not None
        return torch.ones_like(seen.peak) if name in self.wide else self._scales(name, weight, seen)

    def round(self, adapted: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        made: dict[str, LinearWeights] = {}
        for name, full in adapted.linears().items():
            if (adapted.index, name) in self._keep:
                made[name] = replace(full, weight=full.weight.to(self.config.dtype))
                continue
            wide = name in self.wide
            static = static_scale(stats[name].peak) if self._static and not wide else None
            if self.moments:
                made[name] = to_int8_gptq(full, stats[name].moments, static, wide)
            else:
                made[name] = to_int8(full, static, wide)
        return replace(adapted, **made)


class Int4(Method):
    """int4 weights in groups, for W4A16 and W4A4. lm_head, embedding and norms stay in full precision.

    rotated: behind Hadamard rotations, which int4 activations need. rounding "gptq" calibrates, "nearest" needs no
    texts. whole_zeros: only offsets that compressed-tensors can say.
    """

    precision = "w4a16"

    def __init__(
        self,
        config: ModelConfig,
        *,
        group: int = 128,
        symmetric: bool = True,
        rotated: bool = True,
        rounding: str = "nearest",
        whole_zeros: bool = False,
    ) -> None:
        super().__init__(config)
        self._grid = {"group": group, "symmetric": symmetric, "whole_zeros": whole_zeros}
        self._rotation = Rotation(config) if rotated else None
        self.calibrates = self.moments = rounding == "gptq"

    def check(self, backend: Backend) -> None:
        # The smallest layer there is.
        scale = torch.ones(16, 1, dtype=torch.bfloat16)
        offset = () if self._grid["symmetric"] else (torch.zeros_like(scale),)
        backend.int4_weight(torch.zeros(16, 32, dtype=torch.int8), scale, *offset)

    def embedding(self, table: Tensor) -> Tensor:
        return table if self._rotation is None else self._rotation.embedding(table)

    def prepare(self, layer: LayerWeights) -> LayerWeights:
        return layer if self._rotation is None else self._rotation.layer(layer)

    def round(self, adapted: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        made = {}
        for name, full in adapted.linears().items():
            made[name] = to_int4(full, stats[name].moments if self.moments else None, **self._grid)
        return replace(adapted, **made)

    def head(self, head: HeadWeights) -> HeadWeights:
        return head if self._rotation is None else self._rotation.top(head)


def best_int4(config: ModelConfig, source: WeightSource, backend: Backend, rounding: str = "gptq") -> Int4:
    """The int4 for this model and device: groups of 32 with zero points where the device has those, else symmetric
    groups of 128. Rotated, unless the weights lie on an int4 grid already, which rotation would leave."""
    if not backend.int4_offsets:
        return Int4(config, rounding=rounding)
    weight = source.layer(0).down
    assert isinstance(weight, FullWeights)
    return Int4(config, group=32, symmetric=False, rotated=not lies_on_grid(weight), rounding=rounding)


class SameLayers(Method):
    """A method for random weights, whose layers are all the same (`RandomTensors`): it quantises the first and copies
    it, and needs no texts. A pass costs what it does with the method itself; the values mean nothing anyway."""

    def __init__(self, method: Method) -> None:
        """method: one that does not calibrate."""
        super().__init__(method.config)
        self._method = method
        self._first: LayerWeights | None = None
        self.precision, self.wide = method.precision, method.wide

    def check(self, backend: Backend) -> None:
        self._method.check(backend)

    def round(self, adapted: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        if self._first is None:
            self._first = self._method.round(self._method.prepare(adapted), {})
        return replace(deepcopy(self._first), index=adapted.index)  # in memory of its own: caches must not hold it

    def head(self, head: HeadWeights) -> HeadWeights:
        return self._method.head(head)


def int8_head(head: HeadWeights, static: Tensor | None = None, wide: bool = False) -> HeadWeights:
    """lm_head in int8 too; it is not smoothed. static: the scale of its inputs, None for one per token; wide: they keep
    16 bits."""
    assert isinstance(head.lm_head, FullWeights)
    return HeadWeights(head.norm, to_int8(head.lm_head, None if wide else static, wide))
