"""How to keep 4-bit activations alive: nothing, a Hadamard rotation, or outlier channels kept in 8 bits (Atom).

    python scripts/compare_w4a4.py

Rounding is simulated in floating point, so that all ways differ in what they round only. Atom's outliers (arXiv
2310.19102) are the 1/32 of input channels with the largest activations, 128 of 4096 as published, with 8-bit weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quasar import load
from quasar.drafting.draft_models import calibration_ids
from quasar.models.linear import FullLinear, quantize_weight
from quasar.models.linear_int4 import quantize_weight_int4
from quasar.models.model import ASSETS
from quasar.models.sharing import unpacked_copy
from quasar.quantization.calibration import SMOOTHED, collect, read_texts
from quasar.quantization.fidelity import FidelityProbe
from quasar.quantization.rotation import hadamard, rotate_decoder, rotate_last


class Simulated(FullLinear):
    """W4A4 in floating point; `outliers` [in] marks channels that stay in 8 bits on both sides."""

    def __init__(self, full: FullLinear, outliers: Tensor | None = None, online: Tensor | None = None) -> None:
        weight = full.weight.float()
        low = weight if outliers is None else weight.masked_fill(outliers, 0)
        values, scale = quantize_weight_int4(low)
        rounded = (values.float().view(len(values), scale.shape[1], -1) * scale.float()[..., None]).flatten(1)
        if outliers is not None:
            eight, eight_scale = quantize_weight(weight.masked_fill(~outliers, 0))
            rounded = rounded + eight.float() * eight_scale[:, None]
        super().__init__(full.backend, rounded, full.bias)
        self.outliers, self.online = outliers, online

    def forward(self, x: Tensor) -> Tensor:
        if self.online is not None:
            x = rotate_last(x, self.online)
        if self.outliers is None:
            return super().forward(_rounded(x, 7))
        high = _rounded(x.masked_fill(~self.outliers, 0), 127)
        return super().forward(_rounded(x.masked_fill(self.outliers, 0), 7) + high)


def _rounded(x: Tensor, levels: int) -> Tensor:
    """Per token, symmetric."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / levels).clamp(min=1e-12)
    return (x / scale).round() * scale


def main() -> None:
    print("| model | way | mean KL | top-1 | perplexity | full precision's |\n|---|---|---|---|---|---|")
    for name in ("tiny-qwen3", "tiny-openpangu"):
        model = load(name, device="reference")
        texts = [model.encode(text) for text in read_texts(ASSETS / "heldout.jsonl")]
        probe = FidelityProbe(model.decoder, texts)
        stats = collect(model.decoder, calibration_ids(model))
        for way in ("nothing", "Hadamard rotation", "outliers in 8 bits"):
            decoder = unpacked_copy(model.decoder)
            if way == "Hadamard rotation":
                rotate_decoder(decoder)
            for layer in decoder.layers:
                for which in SMOOTHED:
                    outliers = online = None
                    if way == "outliers in 8 bits":
                        peak = stats[layer.index][which].peak
                        outliers = torch.zeros(len(peak), dtype=torch.bool)
                        outliers[peak.topk(len(peak) // 32).indices] = True
                    elif way == "Hadamard rotation" and which == "down":
                        online = hadamard(decoder.config.intermediate_size, 128)
                    setattr(layer, which, Simulated(getattr(layer, which), outliers, online))
            f = probe.compare(decoder)
            print(
                f"| {name} | {way} | {f.mean_kl:.2e} | {f.top1_agreement:.1%} | {f.perplexity:.2f} | "
                f"{f.perplexity_full:.2f} |"
            )


if __name__ == "__main__":
    main()
