"""int4 grids for weights: a scale, and where it helps a zero point, for each group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.checkpoints.weights import INT4_GROUPS, FullWeights, Int4Weights
from quasar.errors import QuasarError
from quasar.quantization.gptq import gptq

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest weight
_ROWS = 16  # outputs are a multiple of it
_SAMPLED, _ON_GRID = 256, 1e-3  # outputs looked at, and the share of their power that rounding may change


def group_of(shape: tuple[int, int], most: int = INT4_GROUPS[0]) -> int:
    """The largest group size up to `most` that divides the inputs of a weight [out, in].

    Raises QuasarError for shapes that the int4 kernels do not take.
    """
    out, inputs = shape
    group = next((g for g in INT4_GROUPS if g <= most and inputs % g == 0), None)
    if group is None or out % _ROWS:
        raise QuasarError(
            f"a linear layer of {inputs} inputs and {out} outputs cannot be int4: multiples of 32 and 16 can; "
            "use --precision w8a8"
        )
    return group


def quantize_weight_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] between -7 and 7, bfloat16 [out, in / group]: symmetric, per group of 128 inputs
    (64 or 32 where 128 does not divide them).

    Each group's scale is the one of a few below max / 7 with the least squared error: clipping the largest weight a
    little makes all others finer. Raises QuasarError for shapes that the int4 kernels do not take.
    """
    group = group_of(tuple(weight.shape))
    grouped = weight.float().view(len(weight), -1, group)
    scale = symmetric_scale(grouped)
    values = (grouped / scale.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
    return values.view(weight.shape), scale


def symmetric_scale(grouped: Tensor) -> Tensor:
    """bfloat16 [out, groups] for weights [out, groups, group]."""
    peak = grouped.abs().amax(dim=-1)
    best_error = torch.full_like(peak, torch.inf)
    scale = torch.ones_like(peak, dtype=torch.bfloat16)
    for clip in _CLIPS:
        tried = torch.where(peak > 0, peak * clip / 7, 1.0).bfloat16()
        rounded = (grouped / tried.float()[..., None]).round().clamp(-7, 7)
        error = (rounded * tried.float()[..., None] - grouped).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, tried, scale)
    return scale


def asymmetric_grid(grouped: Tensor, whole_zeros: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and offset, bfloat16 [out, groups], for weights [out, groups, group]: values -8 to 7 span smallest to
    largest weight, or, clipped, a little less, whichever has the least squared error.

    whole_zeros makes -offset / scale whole numbers between -8 and 7, which is all that compressed-tensors can say.
    """
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    best_error = torch.full_like(low, torch.inf)
    scale, offset = torch.ones_like(low, dtype=torch.bfloat16), torch.zeros_like(low, dtype=torch.bfloat16)
    for clip in (1.03, *_CLIPS) if whole_zeros else _CLIPS:
        step = torch.where(high > low, (high - low) * clip / 15, 1.0).bfloat16()
        middle = (low + high + step.float()) / 2  # the weight that value 0 stands for
        if whole_zeros:
            middle = (middle / step.float()).round().clamp(-7, 8) * step.float()
        middle = middle.bfloat16()
        rounded = ((grouped - middle.float()[..., None]) / step.float()[..., None]).round().clamp(-8, 7)
        error = rounded * step.float()[..., None] + middle.float()[..., None] - grouped
        error = error.square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale, offset = torch.where(better, step, scale), torch.where(better, middle, offset)
    return scale, offset


def to_int4(
    full: FullWeights,
    moments: Tensor | None = None,
    *,
    group: int = INT4_GROUPS[0],
    symmetric: bool = True,
    whole_zeros: bool = False,
) -> Int4Weights:
    """Full-precision weights in groups of `group` inputs or fewer; by GPTQ with moments (see InputStats), else to the
    nearest."""
    weight = full.weight.float()
    grouped = weight.view(len(weight), -1, group_of(tuple(weight.shape), group))
    if symmetric:
        scale, offset, low = symmetric_scale(grouped), None, -7
    else:
        (scale, offset), low = asymmetric_grid(grouped, whole_zeros), -8
    if moments is not None:
        values = gptq(weight, moments, scale, offset, low, 7)
    else:
        at = grouped if offset is None else grouped - offset.float()[..., None]
        values = (at / scale.float()[..., None]).round().clamp(low, 7).to(torch.int8).view(weight.shape)
    return Int4Weights(values, scale, offset, full.bias, full.hadamard)


def lies_on_grid(full: FullWeights) -> bool:
    """Whether asymmetric groups of 32 hold these weights as they are, as they do those of a 4-bit GGUF file."""
    if full.weight.shape[1] % INT4_GROUPS[-1]:
        return False
    weight = full.weight[:_SAMPLED].float()
    grouped = weight.view(len(weight), -1, INT4_GROUPS[-1])
    scale, offset = (part.float()[..., None] for part in asymmetric_grid(grouped))
    error = ((grouped - offset) / scale).round().clamp(-8, 7) * scale + offset - grouped
    return bool(error.square().mean() < _ON_GRID * grouped.square().mean())
