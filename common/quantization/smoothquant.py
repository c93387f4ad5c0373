"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move the activations' outliers into the weights.

A linear layer's input channel j is divided by s_j and the weight's column j multiplied by it. The division costs
nothing: it is folded into what makes the input, the RMSNorm before q/k/v and gate/up, the rows of v_proj before
o_proj, the rows of up_proj before down_proj. In full precision nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quasar.models.linear import FullLinear, quantize_weight
from quasar.quantization.calibration import SMOOTHED, InputStats

if TYPE_CHECKING:
    from quasar.models.decoder import DecoderLayer

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried by the search
_TINY = 1e-5  # a channel that never fires must not divide by zero


def smoothing_scales(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [in], for peak [in] and weight [out, in] (eq. 4)."""
    columns = weight.float().abs().amax(dim=0).clamp(min=_TINY)
    return (peak.clamp(min=_TINY) ** alpha / columns ** (1 - alpha)).clamp(min=_TINY)


def smooth_layer(
    layer: DecoderLayer, stats: dict[str, InputStats], alpha: float | None, dtype: torch.dtype
) -> dict[str, float]:
    """Folds smoothing scales for all four linear inputs into an unpacked layer, whose weights become float32.

    alpha None searches ALPHAS for each input. Norms and biases stay representable in dtype, the checkpoint's, so the
    smoothed model can be saved as it is. The peaks in stats become those of the smoothed inputs. Returns the alpha
    used for each.
    """
    used, scales = {}, {}
    for name in SMOOTHED:
        weight = getattr(layer, name).weight
        used[name] = _search_alpha(layer, name, stats[name]) if alpha is None else alpha
        scales[name] = _foldable(layer, name, smoothing_scales(stats[name].peak, weight, used[name]))
    layer.input_norm, scales["qkv"] = _fold_norm(layer.input_norm, layer.qkv, scales["qkv"], dtype)
    layer.post_norm, scales["gate_up"] = _fold_norm(layer.post_norm, layer.gate_up, scales["gate_up"], dtype)
    _fold_v(layer, scales["o"], dtype)
    _fold_up(layer, scales["down"], dtype)
    for name in SMOOTHED:
        stats[name].peak = stats[name].peak / scales[name]
    return used


def _foldable(layer: DecoderLayer, name: str, scales: Tensor) -> Tensor:
    """o_proj's input repeats each v head for a group of q heads (GQA), so a group shares its largest scale."""
    if name != "o":
        return scales
    spec = layer.attention
    grouped = scales.view(spec.kv_heads, -1, spec.head_dim)  # [kv_heads, group, head_dim]
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def _fold_norm(norm: Tensor, linear: FullLinear, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the divided norm and what it was really divided by: it is rounded to dtype first and the weight
    multiplied by that, so folding is exact in bfloat16 too."""
    folded = (norm.float() / scales).to(dtype).to(norm.dtype)
    divided = torch.where(folded != 0, norm.float() / folded.float(), scales)
    linear.weight = linear.weight.float() * divided
    return folded, divided


def _fold_v(layer: DecoderLayer, scales: Tensor, dtype: torch.dtype) -> None:
    spec = layer.attention
    per_row = scales.view(spec.kv_heads, -1, spec.head_dim)[:, 0].reshape(-1)  # [kv_heads * head_dim]
    _divide_rows(layer.qkv, len(per_row), per_row, dtype)
    layer.o.weight = layer.o.weight.float() * scales


def _fold_up(layer: DecoderLayer, scales: Tensor, dtype: torch.dtype) -> None:
    _divide_rows(layer.gate_up, len(scales), scales, dtype)
    layer.down.weight = layer.down.weight.float() * scales


def _divide_rows(linear: FullLinear, last: int, scales: Tensor, dtype: torch.dtype) -> None:
    """Divides the last rows of a fused projection, v of qkv or up of gate_up, and their biases."""
    weight = linear.weight.float().clone()
    weight[-last:] /= scales[:, None]
    linear.weight = weight
    if linear.bias is not None:
        bias = linear.bias.float().clone()
        bias[-last:] /= scales
        linear.bias = bias.to(dtype)


def _search_alpha(layer: DecoderLayer, name: str, stats: InputStats) -> float:
    """The alpha whose fake-quantised layer output is nearest to the float one on the sampled inputs."""
    weight = getattr(layer, name).weight.float()
    target = stats.rows @ weight.t()

    def error(alpha: float) -> float:
        scales = _foldable(layer, name, smoothing_scales(stats.peak, weight, alpha))
        return (fake_quantized_output(stats.rows / scales, weight * scales) - target).square().sum().item()

    return min(ALPHAS, key=error)


def fake_quantized_output(x: Tensor, weight: Tensor) -> Tensor:
    """What W8A8 computes, in floating point: x [tokens, in] and weight [out, in] both rounded to their int8 grids."""
    (x8, x_scale), (w8, w_scale) = quantize_weight(x), quantize_weight(weight)  # a token is a row like any other
    return (x8.float() * x_scale[:, None]) @ (w8.float() * w_scale[:, None]).t()
