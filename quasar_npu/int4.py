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
    """`values` int32 [in, out / 8], `scale` of the activations' type [in / group, out], `offset` likewise or None.

    A weight is (value + offset) * scale: an offset counts in steps of the grid. `group` is 0 where one group spans all
    inputs: the operator wants groups smaller than that, or none.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    group: int


def int4_packed(values: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Int4Weight:
    """int8 [out, in] between -8 and 7, bfloat16 [out, in / group], offset likewise (a weight is value * scale + offset)
    or None, on the device -> what the operator takes.

    Whole zero points arrive as such; others are rounded to dtype. Raises QuasarError beyond 65535 inputs or outputs,
    and where an offset is too many steps for float16.
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
    steps = None
    if offset is not None:
        steps = offset.float() / scale.float()
        whole = steps.round()  # of which the offset may be the bfloat16
        steps = torch.where((whole * scale.float()).bfloat16() == offset, whole, steps).t().contiguous().to(dtype)
        if not bool(steps.isfinite().all()):
            raise QuasarError(
                f"a linear layer of {inputs} inputs and {out} outputs has zero points beyond "
                f"{torch.finfo(dtype).max:.0f} steps, which {str(dtype)[6:]} cannot hold; use --dtype bfloat16"
            )
    return Int4Weight(packed, scale.t().contiguous().to(dtype), steps, inputs // groups if groups > 1 else 0)


def quantize_rows_int4(x: Tensor) -> Quantized:
    """[tokens, in] -> int4 in int8, float32 [tokens]: max|row| / 7, 1 for a row of zeros.

    Not npu_dynamic_quant, whose int4 comes packed for an int4 matmul that takes no scale per group of 128.
    """
    x = x.float()
    peak = x.abs().amax(dim=-1)
    scale = torch.where(peak > 0, peak / 7, 1.0)
    return Quantized((x / scale[:, None]).round().to(torch.int8), scale)
