"""How to keep 4-bit activations alive: nothing, a Hadamard rotation, or outlier channels kept in 8 bits (Atom).

    python scripts/experiments/compare_w4a4.py

Rounding is simulated in floating point, so that all ways differ in what they round only. Atom's outliers (arXiv
2310.19102) are the 1/32 of input channels with the largest activations, 128 of 4096 as published, with 8-bit weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quasar import load
from quasar.checkpoints.weights import FullWeights, LayerWeights
from quasar.drafting.draft_models import calibration_ids
from quasar.models.config import ModelConfig
from quasar.models.linear import FullLinear
from quasar.models.model import ASSETS
from quasar.quantization.calibration import InputStats, read_texts
from quasar.quantization.fidelity import FidelityProbe
from quasar.quantization.int4 import quantize_weight_int4
from quasar.quantization.methods import Int4
from quasar.quantization.rounding import quantize_weight
from quasar.quantization.stream import quantized_decoder

WAYS = ("nothing", "Hadamard rotation", "outliers in 8 bits")


class Rounding(FullLinear):
    """Rounds its input, rotated where its weights say so; `outliers` [in] marks channels that stay in 8 bits."""

    outliers: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.hadamard is not None:
            x = self.backend.rotate(x, self.hadamard)
        rounded = _rounded(x if self.outliers is None else x.masked_fill(self.outliers, 0), 7)
        if self.outliers is not None:
            rounded = rounded + _rounded(x.masked_fill(~self.outliers, 0), 127)
        return self.backend.linear(rounded, self.packed, self.bias)


class Simulated(Int4):
    """Weights rounded to int4 in floating point, the channels of the largest activations to int8 where asked."""

    calibrates = True

    def __init__(self, config: ModelConfig, way: str) -> None:
        super().__init__(config, rotated=way == "Hadamard rotation")
        self.calibrates = True
        self.marks_outliers = way == "outliers in 8 bits"
        self.outliers: dict[tuple[int, str], Tensor] = {}

    def round(self, adapted: LayerWeights, stats: dict[str, InputStats]) -> LayerWeights:
        made = {}
        for name, full in adapted.linears().items():
            weight, outliers = full.weight.float(), None
            if self.marks_outliers:
                peak = stats[name].peak
                outliers = torch.zeros(len(peak), dtype=torch.bool)
                outliers[peak.topk(len(peak) // 32).indices] = True
                self.outliers[adapted.index, name] = outliers
            low = weight if outliers is None else weight.masked_fill(outliers, 0)
            values, scale = quantize_weight_int4(low)
            rounded = (values.float().view(len(values), scale.shape[1], -1) * scale.float()[..., None]).flatten(1)
            if outliers is not None:
                eight, eight_scale = quantize_weight(weight.masked_fill(~outliers, 0))
                rounded = rounded + eight.float() * eight_scale[:, None]
            made[name] = FullWeights(rounded, full.bias, full.hadamard)
        return adapted.convert(made)


def _rounded(x: Tensor, levels: int) -> Tensor:
    """Per token, symmetric."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / levels).clamp(min=1e-12)
    return (x / scale).round() * scale


def main() -> None:
    print("| model | way | mean KL | top-1 | perplexity | full precision's |\n|---|---|---|---|---|---|")
    for name in ("tiny-qwen3", "tiny-openpangu"):
        model = load(name, device="reference")
        probe = FidelityProbe(model.decoder, [model.encode(text) for text in read_texts(ASSETS / "heldout.jsonl")])
        for way in WAYS:
            method = Simulated(model.config, way)
            texts = calibration_ids(model)
            decoder, _ = quantized_decoder(model.config, model.weights, model.decoder.backend, method, texts)
            for layer in decoder.layers:
                for which in ("qkv", "o", "gate_up", "down"):
                    linear = getattr(layer, which)
                    linear.__class__ = Rounding
                    linear.outliers = method.outliers.get((layer.index, which))
            f = probe.compare(decoder)
            print(
                f"| {name} | {way} | {f.mean_kl:.2e} | {f.top1_agreement:.1%} | {f.perplexity:.2f} | "
                f"{f.perplexity_full:.2f} |"
            )


if __name__ == "__main__":
    main()
