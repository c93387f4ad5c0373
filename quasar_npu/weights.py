"""Weights in the NPU's own storage format, FRACTAL_NZ: cast once, read in whole tiles by the matrix unit ever after."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

_FRACTAL_NZ = 29
_MAX_OUT = 65535  # the last dimension of an operand of npu_quant_matmul

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Part:
    """Some output channels of an int8 layer: `values` int8 [in, out] in FRACTAL_NZ, `scale` float32 [out]."""

    values: Tensor
    scale: Tensor
    first: int  # of its channels in the whole layer


def float_nz_wanted() -> bool:
    """QUASAR_NPU_FLOAT_NZ=1: floating-point weights in FRACTAL_NZ too. On older CANN their product is then an operator
    that no graph can hold, so it is for those who have measured it."""
    return os.environ.get("QUASAR_NPU_FLOAT_NZ") == "1"


def fractal(weight: Tensor) -> Tensor:
    """A copy of a device tensor in FRACTAL_NZ. Shape and values stay. A matrix of one row or column stays as it is."""
    import torch_npu

    if min(weight.shape[-2:]) == 1:
        return weight.contiguous()
    cast = torch_npu.npu_format_cast(weight.contiguous(), _FRACTAL_NZ)
    if int(torch_npu.get_npu_format(cast)) != _FRACTAL_NZ:
        log.warning(
            "weights stay in row-major order: this CANN did not cast them to FRACTAL_NZ; matmuls will be slower"
        )
    return cast


def int8_parts(values: Tensor, scale: Tensor, transposed: bool = False) -> list[Int8Part]:
    """int8 [out, in], float32 [out], on the device -> parts that npu_quant_matmul takes, one unless out > 65535.

    A2 and A3 cast the [in, out] matrix; inference cards cast [out, in] and pass it transposed.
    """
    count = -(-len(scale) // _MAX_OUT)
    size = -(-len(scale) // count // 16) * 16 if count > 1 else len(scale)  # whole tiles
    size = min(size, _MAX_OUT // 16 * 16) if count > 1 else size
    parts = []
    for first in range(0, len(scale), size):
        block, block_scale = values[first : first + size], scale[first : first + size].float().contiguous()
        matrix = fractal(block).t() if transposed else fractal(block.t())
        parts.append(Int8Part(matrix, block_scale, first))
    return parts


def bias_of(part: Int8Part, bias: Tensor | None) -> Tensor | None:
    """The bias of one part."""
    return None if bias is None else bias[part.first : part.first + len(part.scale)]


def joined(outputs: list[Tensor], dim: int = -1) -> Tensor:
    """[tokens, out] of all parts."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=dim)
