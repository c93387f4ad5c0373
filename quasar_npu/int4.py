"""int4 weights for npu_weight_quant_batchmatmul, and activations rounded to int4.

Eight weights lie in an int32, row-major: FRACTAL_NZ is documented for compiled graphs only, not for single calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import Quantized
from quasar.errors import QuasarError

_MAX_FEATURES = 65535  # of either dimension of the weight


@dataclass(frozen=True)
class Int4Weight:
    """`values` int32 [in, out / 8], `scale` of the activations' type [in / group, out].

    `group` is 0 where one group spans all inputs: the operator wants groups smaller than that, or none.
    """

    values: Tensor
    scale: Tensor
    group: int


def int4_packed(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Int4Weight:
    """int8 [out, in] between -8 and 7, bfloat16 [out, in / group], on the device -> what the operator takes.

    Raises QuasarError beyond 65535 inputs or outputs.
    """
    import torch_npu

    out, inputs = values.shape
    if max(out, inputs) > _MAX_FEATURES:
        raise QuasarError(
            f"a linear layer of {inputs} inputs and {out} outputs cannot be int4 on Ascend, up to {_MAX_FEATURES} can; "
            "use --precision w8a8"
        )
    packed = torch_npu.npu_convert_weight_to_int4pack(values.t().contiguous().int())
    groups = scale.shape[1]
    return Int4Weight(packed, scale.t().contiguous().to(dtype), inputs // groups if groups > 1 else 0)


def quantize_rows_int4(x: Tensor) -> Quantized:
    """[tokens, in] -> int4 in int8, float32 [tokens]: max|row| / 7, 1 for a row of zeros.

    Not npu_dynamic_quant, whose int4 comes packed for an int4 matmul that takes no scale per group of 128.
    """
    x = x.float()
    peak = x.abs().amax(dim=-1)
    scale = torch.where(peak > 0, peak / 7, 1.0)
    return Quantized((x / scale[:, None]).round().to(torch.int8), scale)
