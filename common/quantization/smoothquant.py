"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move the activations' outliers into the weights.

A linear layer's input channel j is divided by s_j and the weight's column j multiplied by it. The division costs
nothing: it is folded into what makes the input, the RMSNorm before q/k/v and gate/up, the rows of v_proj before
o_proj, the rows of up_proj before down_proj. In full precision nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quasar.checkpoints.weights import LINEARS, FullWeights, LayerWeights
from quasar.models.config import ModelConfig
from quasar.quantization.calibration import InputStats
from quasar.quantization.rounding import fake_quantized_output

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried by the search
_TINY = 1e-5  # a channel that never fires must not divide by zero
_STEPS, _RATE = 40, 0.1  # of the descent to fitted scales; the rate is of their logarithms and falls to 0
_SAMPLED_OUTPUTS = 128  # of a weight, for its largest numbers
_GPTQ_LEAVES = 0.4  # of the noise of rounding to nearest, in variance

# Scales float32 [in] for one linear layer, from its name, weight [out, in] and statistics.
Scales = Callable[[str, Tensor, InputStats], Tensor]


def smoothing_scales(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [in], for peak [in] and weight [out, in] (eq. 4)."""
    columns = weight.float().abs().amax(dim=0).clamp(min=_TINY)
    return (peak.clamp(min=_TINY) ** alpha / columns ** (1 - alpha)).clamp(min=_TINY)


def published_scales(config: ModelConfig, alpha: float | None) -> Scales:
    """The paper's scales; alpha None searches ALPHAS for the one whose W8A8 output is nearest on sampled inputs."""

    def scales(name: str, weight: Tensor, stats: InputStats) -> Tensor:
        used = _search_alpha(config, name, weight, stats) if alpha is None else alpha
        return smoothing_scales(stats.peak, weight, used)

    return scales


def fitted_scales(config: ModelConfig) -> Scales:
    """Scales that make rounding noise least, by a model of it rather than a formula.

    Rounding adds noise of variance step^2 / 12 to every number. A token's step is its largest |x_j / s_j| / 127, and
    an output's its largest |w_oj s_j| / 127, so at the outputs, summed over tokens t (weighted, see InputStats) and
    outputs o, there is in units of 1 / (12 * 127^2)

        A B + G C D,   A = sum_t r_t max_j (x_tj / s_j)^2,  B = sum_j s_j^2 sum_o w_oj^2   (activations)
                       C = sum_o max_j (w_oj s_j)^2,        D = sum_j sum_t r_t x_tj^2 / s_j^2   (weights)

    where G is what GPTQ leaves of the weights' noise. Gradient descent on its logarithm, from the paper's scales; a
    maximum's gradient belongs to the channel that holds it.
    """

    def scales(name: str, weight: Tensor, stats: InputStats) -> Tensor:
        weight = weight.float()
        x2 = stats.rows.square() * stats.weights[:, None]  # [sample, in]
        w2 = weight[:: max(1, len(weight) // _SAMPLED_OUTPUTS)].square()
        c = weight.square().sum(dim=0) * (len(w2) / len(weight))  # [in]
        d = x2.sum(dim=0)
        log_s = foldable(config, name, smoothing_scales(stats.peak, weight, 0.5)).log()
        best, least = log_s, torch.inf
        for step in range(_STEPS):
            s2 = (2 * log_s).exp()
            peaks, at = (x2 / s2).max(dim=1)
            w_peaks, w_at = (w2 * s2).max(dim=1)
            a, b = peaks.sum(), s2 * c
            big, e = w_peaks.sum(), d / s2
            activations, rest = a * b.sum(), _GPTQ_LEAVES * big * e.sum()
            noise = (activations + rest).item()
            if noise < least:
                best, least = log_s, noise
            zeros = torch.zeros_like(log_s)
            slope = (b / b.sum() - zeros.index_add(0, at, peaks) / a) * activations
            slope += (zeros.index_add(0, w_at, w_peaks) / big - e / e.sum()) * rest
            slope = _tied(config, name, slope / noise)
            # Every channel's share of the noise is about 1 / in: steps are in units of that.
            rate = _RATE * (1 - step / _STEPS)
            log_s = log_s - rate * (slope * len(slope)).clamp(-1, 1)
        return best.exp()

    return scales


def _tied(config: ModelConfig, name: str, slope: Tensor) -> Tensor:
    """The heads of a group share their scales: each gets the mean slope."""
    if name != "o":
        return slope
    grouped = slope.view(config.num_kv_heads, -1, config.head_dim)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def smooth_layer(
    layer: LayerWeights, stats: dict[str, InputStats], scales: Scales, config: ModelConfig
) -> LayerWeights:
    """The layer with smoothing scales folded into all four linear inputs; its weights become float32.

    Norms and biases stay representable in the checkpoint's type, so the smoothed model can be saved as it is. Peaks
    and samples in stats become those of the smoothed inputs.
    """
    chosen = {
        name: foldable(config, name, scales(name, full.weight, stats[name])) for name, full in layer.linears().items()
    }
    input_norm, chosen["qkv"] = _fold_norm(layer.input_norm, chosen["qkv"], config.dtype)
    post_norm, chosen["gate_up"] = _fold_norm(layer.post_norm, chosen["gate_up"], config.dtype)
    heads = chosen["o"].view(config.num_kv_heads, -1, config.head_dim)
    v_rows = heads[:, 0].reshape(-1)  # [kv_heads * head_dim]
    smoothed = {name: _multiplied(full, chosen[name]) for name, full in layer.linears().items()}
    smoothed["qkv"] = _divide_rows(smoothed["qkv"], v_rows, config.dtype)
    smoothed["gate_up"] = _divide_rows(smoothed["gate_up"], chosen["down"], config.dtype)
    for name in LINEARS:
        stats[name].divide(chosen[name])
    return replace(layer, input_norm=input_norm, post_norm=post_norm, **smoothed)


def foldable(config: ModelConfig, name: str, scales: Tensor) -> Tensor:
    """o_proj's input repeats each v head for a group of q heads (GQA), so a group shares its largest scale."""
    if name != "o":
        return scales
    grouped = scales.view(config.num_kv_heads, -1, config.head_dim)  # [kv_heads, group, head_dim]
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def _fold_norm(norm: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the divided norm and what it was really divided by: it is rounded to dtype first and the weight
    multiplied by that, so folding is exact in bfloat16 too."""
    norm = norm.to(scales.device)
    folded = (norm.float() / scales).to(dtype)
    return folded, torch.where(folded != 0, norm.float() / folded.float(), scales)


def _multiplied(full: FullWeights, scales: Tensor) -> FullWeights:
    return FullWeights(full.weight.to(scales.device, torch.float32) * scales, full.bias)


def _divide_rows(full: FullWeights, scales: Tensor, dtype: torch.dtype) -> FullWeights:
    """Divides the last rows of a fused projection, v of qkv or up of gate_up, and their biases."""
    weight = full.weight.clone()
    weight[-len(scales) :] /= scales[:, None]
    if full.bias is None:
        return FullWeights(weight, None)
    bias = full.bias.to(scales.device, torch.float32, copy=True)
    bias[-len(scales) :] /= scales
    return FullWeights(weight, bias.to(dtype))


def _search_alpha(config: ModelConfig, name: str, weight: Tensor, stats: InputStats) -> float:
    """The alpha whose fake-quantised layer output is nearest to the float one on the sampled inputs."""
    weight = weight.float()
    target = stats.rows @ weight.t()

    def error(alpha: float) -> float:
        scales = foldable(config, name, smoothing_scales(stats.peak, weight, alpha))
        return (fake_quantized_output(stats.rows / scales, weight * scales) - target).square().sum().item()

    return min(ALPHAS, key=error)
