"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input channel after the other, and let the channels that are
still to be rounded make up for the error, as far as the inputs seen in calibration correlate."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of the moments' diagonal, added to it: the paper's "percdamp"
_LEAF = 128  # rows of a triangle inverted at once
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
    diagonal = factor.diagonal().tolist()
    group = (order // (inputs // scale.shape[1])).tolist()
    # Transposed: a channel is a row in memory.
    left = weight.float().t()[order].contiguous()  # [in, out], as far as it is not rounded yet
    scales = scale.float().t().contiguous()  # [groups, out]
    offsets = None if offset is None else offset.float().t().contiguous()
    values = torch.empty(inputs, out, dtype=torch.int8, device=device)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty(stop - start, out, device=device)
        for i, at in enumerate(range(start, stop)):
            row, s = left[at], scales[group[at]]
            if i:  # what the block's earlier channels leave to make up for
                row.addmv_(errors[:i].t(), factor[start:at, at], alpha=-1)
            if offsets is not None:
                row -= offsets[group[at]]
            rounded = (row / s).round_().clamp_(low, high)
            values[at] = rounded
            torch.sub(row, rounded.mul_(s), out=errors[i]).div_(diagonal[at])
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(values)
    result[order] = values
    return result.t().contiguous()


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (moments, damped)^-1, float32 [in, in]."""
    damped = moments.to(torch.float32, copy=True)
    power = damped.diagonal()
    power += _DAMPING * power.mean().clamp(min=1e-12)  # a view: this changes `damped`
    # Of the matrix turned round the lower factor is, turned round again, an upper R with R R^T = damped: U is R^-1.
    try:
        upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    except torch.linalg.LinAlgError:  # inputs that are not numbers: each channel by itself, and fidelity will say it
        return torch.eye(len(damped), device=damped.device)
    return _inverse_upper(upper)


def _inverse_upper(upper: Tensor) -> Tensor:
    """By halves, since products are what processors are fast at."""
    n = len(upper)
    if n <= _LEAF:
        return torch.linalg.solve_triangular(upper, torch.eye(n, device=upper.device), upper=True)
    half = n // 2
    inverse = torch.zeros_like(upper)
    first, last = _inverse_upper(upper[:half, :half]), _inverse_upper(upper[half:, half:])
    inverse[:half, :half] = first
    inverse[half:, half:] = last
    inverse[:half, half:] = -(first @ upper[:half, half:] @ last)
    return inverse
