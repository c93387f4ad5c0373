"""The CUDA backend: the reference's operations on an NVIDIA card, int8 matmuls through torch._int_mm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backends.base import AttentionSpec, KVCache
from common.backends.reference import ReferenceBackend, masked_attention
from common.errors import QuasarError

_INT_MM_ROWS = 17  # cuBLASLt's int8 matmul wants more than 16 rows ...
_INT_MM_MULTIPLE = 8  # ... and inner and outer sizes that are multiples of 8


class CudaBackend(ReferenceBackend):
    name = "cuda"

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        if not torch.cuda.is_available():
            raise QuasarError(f"--device {device}: no CUDA device here; use --device cpu")
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise QuasarError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        super().__init__(torch.device("cuda", index), dtype)

    def int8_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return padded_int_mm(x, weight)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def attention(self, q: Tensor, spec: AttentionSpec, cache: KVCache, layer: int) -> Tensor:
        start, end = cache.length, cache.length + q.shape[0]
        return masked_attention(q, cache.k[layer, :, :end], cache.v[layer, :, :end], start)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def padded_int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [tokens, in] by int8 [out, in] -> int32 [tokens, out], with zeros added until torch._int_mm takes it."""
    tokens, inputs = x.shape
    out = weight.shape[0]
    rows, more_in, more_out = max(_INT_MM_ROWS - tokens, 0), -inputs % _INT_MM_MULTIPLE, -out % _INT_MM_MULTIPLE
    if rows or more_in:
        x = F.pad(x, (0, more_in, 0, rows))
    if more_in or more_out:  # real models' sizes are multiples already
        weight = F.pad(weight, (0, more_in, 0, more_out))
    return torch._int_mm(x, weight.t())[:tokens, :out]
