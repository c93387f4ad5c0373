"""Symmetric int8 grids: a scale per output channel for weights, per token or per tensor for activations."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.checkpoints.weights import FullWeights, Int8Weights
from quasar.quantization.gptq import gptq

_ROWS = 8192  # quantised at a time


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in], float32 [out]: symmetric, scale = max|row| / 127 (1 for a row of zeros)."""
    # In blocks of rows: a whole lm_head in float32, several times over, would be the peak of everything's memory.
    blocks = [_quantize_rows(rows.float()) for rows in weight.split(_ROWS)]
    return torch.cat([values for values, _ in blocks]), torch.cat([scale for _, scale in blocks])


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    peak = rows.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def to_int8(full: FullWeights, static_scale: Tensor | None = None, wide: bool = False) -> Int8Weights:
    """Full-precision weights rounded to the nearest int8. wide: under 16-bit inputs."""
    assert full.hadamard is None
    values, scale = quantize_weight(full.weight)
    return Int8Weights(values, scale, full.bias, static_scale, wide=wide)


def to_int8_gptq(
    full: FullWeights, moments: Tensor, static_scale: Tensor | None = None, wide: bool = False
) -> Int8Weights:
    """Full-precision weights rounded by GPTQ, on the grid that rounding to nearest has. wide: under 16-bit inputs."""
    assert full.hadamard is None
    weight = full.weight.float()
    peak = weight.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    values = gptq(weight, moments, scale[:, None], None, -127, 127)
    return Int8Weights(values, scale, full.bias, static_scale, wide=wide)


def static_scale(peak: Tensor) -> Tensor:
    """float32 [1] for inputs whose channels peak at `peak` [in]."""
    return (peak.amax(keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)


def fake_quantized(rows: Tensor) -> Tensor:
    """Rows [n, features] rounded to their int8 grids, a scale per row, in floating point."""
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).round_().mul_(scale)


def fake_quantized_output(x: Tensor, weight: Tensor) -> Tensor:
    """What W8A8 computes, in floating point: x [tokens, in] and weight [out, in] both rounded to their int8 grids."""
    return fake_quantized(x) @ fake_quantized(weight).t()
