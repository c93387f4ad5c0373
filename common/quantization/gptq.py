"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input channel after the other, and let the channels that are
still to be rounded make up for the error, as far as the inputs seen in calibration correlate."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of the moments' diagonal, added to it: the paper's "percdamp"
_BLOCK = 64  # channels rounded before the rest is brought up to date


def gptq(
    weight: Tensor, moments: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, block: int = _BLOCK
) -> Tensor:
    """Rounds weight [out, in] to values * scale + offset, and returns values int8 [out, in] between low and high.

    moments [in, in] is the sum of x x^T over calibration; scale and offset (None: 0) are float [out, groups], each for
    in / groups neighbouring inputs, and stay as they are given. Channels are taken in the order of their inputs'
    power, the loudest first (the paper's "act-order"), so that the others make up for them.
    """
    out, inputs = weight.shape
    device = weight.device
    power = moments.diagonal()
    order = power.argsort(descending=True)
    factor = _inverse_factor(moments[order][:, order])
    group = (order // (inputs // scale.shape[1])).tolist()
    # Transposed: a channel is a row in memory.
    left = weight.float().t()[order].contiguous()  # [in, out], as far as it is not rounded yet
    scales = scale.float().t().contiguous()  # [groups, out]
    offsets = None if offset is None else offset.float().t().contiguous()
    values = torch.empty(inputs, out, dtype=torch.int8, device=device)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        rows = left[start:stop]
        errors = torch.empty_like(rows)
        for i in range(stop - start):
            at = start + i
            s = scales[group[at]]
            if offsets is not None:
                rows[i] -= offsets[group[at]]
            rounded = (rows[i] / s).round_().clamp_(low, high)
            values[at] = rounded
            error = torch.sub(rows[i], rounded.mul_(s), out=errors[i]).div_(factor[at, at])
            rows[i + 1 :].addr_(factor[at, at + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(values)
    result[order] = values
    return result.t().contiguous()


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (moments, damped)^-1, float32 [in, in]."""
    damped = moments.to(torch.float64, copy=True)
    power = damped.diagonal()
    mean = power.mean().clamp(min=1e-12)
    power += _DAMPING * mean  # a view: this changes `damped`; channels that never fire get this alone
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
