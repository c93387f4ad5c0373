"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input channel after the other, and let the channels that are
still to be rounded make up for the error, as far as the inputs seen in calibration correlate."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of the moments' diagonal, added to it: the paper's "percdamp"
_LEAF = 256  # rows of a matrix factored at once
_BLOCK, _NEAR = 128, 16  # channels rounded before all others, and before those of their block, are brought up to date
_HALVES = 1.5 * 2**23  # added and taken off again it rounds, halves to even; round_ wakes all threads for a short row


def gptq(weight: Tensor, moments: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
    """Rounds weight [out, in] to values * scale + offset, and returns values int8 [out, in] between low and high.

    moments [in, in] is the sum of x x^T over calibration; scale and offset (None: 0) are float [out, groups], each for
    in / groups neighbouring inputs, and stay as they are given. Channels are taken in the order of their inputs'
    power, the loudest first (the paper's "act-order"), so that the others make up for them.
    """
    out, inputs = weight.shape
    device = weight.device
    power = moments.diagonal()
    order = power.argsort(descending=True)
    takes = _taken(moments.index_select(0, order).index_select(1, order))
    group = (order // (inputs // scale.shape[1])).tolist()
    # Transposed: a channel is a row in memory.
    left = weight.float().index_select(1, order).t().contiguous()  # [in, out], as far as it is not rounded yet
    scales = scale.float().t().contiguous().unbind()  # of each group [out]
    offsets = None if offset is None else offset.float().t().contiguous().unbind()
    values = torch.empty(inputs, out, dtype=torch.int8, device=device)
    rounded, errors = torch.empty(2, min(_BLOCK, inputs), out, device=device)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        for first in range(start, stop, _NEAR):
            last = min(first + _NEAR, stop)
            done, near = slice(first - start), slice(first - start, last - start)
            left[first:last].addmm_(takes[first:last, start:first], errors[done], alpha=-1)
            made = errors[near].t()
            rows = zip(left[first:last], rounded[near], errors[near], strict=True)
            for at, (row, whole, error) in enumerate(rows, first):
                if at > first:
                    row.addmv_(made[:, : at - first], takes[at, first:at], alpha=-1)
                if offsets is not None:
                    row -= offsets[group[at]]
                torch.div(row, scales[group[at]], out=whole).clamp_(low, high).add_(_HALVES).sub_(_HALVES)
                torch.mul(whole, scales[group[at]], out=error)
                torch.sub(row, error, out=error)
        values[start:stop] = rounded[: stop - start]
        left[stop:].addmm_(takes[stop:, start:stop], errors[: stop - start], alpha=-1)
    return torch.empty_like(values).index_copy_(0, order, values).t().contiguous()


def _taken(moments: Tensor) -> Tensor:
    """Float32 [in, in], lower triangular: what a channel (row) takes of each earlier one's error (column).

    That is U^T with every column divided by its diagonal's number, for the upper triangular U with U^T U = (moments,
    damped)^-1.
    """
    damped = moments.to(torch.float32, copy=True)
    power = damped.diagonal()
    power += _DAMPING * power.mean().clamp(min=1e-12)  # a view: this changes `damped`
    try:
        factor = _inverse_factor(damped).t()
        return (factor / factor.diagonal()).contiguous()
    except torch.linalg.LinAlgError:  # inputs that are not numbers: each channel by itself, and fidelity will say it
        return torch.eye(len(damped), device=damped.device)


def _inverse_factor(matrix: Tensor) -> Tensor:
    """Upper triangular U with U^T U = matrix^-1, by halves, since products are what processors are fast at.

    U is the inverse of the upper R with R R^T = matrix. Of R = [[A, B], [0, C]] the matrix's halves say C C^T, B C^T
    and A A^T + B B^T, and U = [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    n = len(matrix)
    if n <= _LEAF:  # turned round, R is a lower factor
        upper = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
        return torch.linalg.solve_triangular(upper, torch.eye(n, device=matrix.device), upper=True)
    half = n // 2
    last = _inverse_factor(matrix[half:, half:])
    cross = matrix[:half, half:] @ last.t()
    first = _inverse_factor(torch.addmm(matrix[:half, :half], cross, cross.t(), alpha=-1))
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = first
    inverse[half:, half:] = last
    inverse[:half, half:] = -(first @ (cross @ last))
    return inverse
