"""NVIDIA: the CUDA backend, and `python -m quasar_gpu.generate`."""

from __future__ import annotations

import torch

from quasar.backends.base import Backend
from quasar_gpu.device import open_cuda


def cuda_backend(device: str, dtype: torch.dtype | None) -> Backend:
    """The backend for the card that "cuda" or "cuda:1" is; dtype None takes bfloat16.

    Raises QuasarError where the card or Triton is missing, or the card too old.
    """
    place = open_cuda(device)
    from quasar_gpu.backend import CudaBackend  # needs Triton, which open_cuda has found

    return CudaBackend(place, dtype or torch.bfloat16)
