"""Devices. `get_backend` is the one place that knows where each backend lives."""

from __future__ import annotations

import torch

from quasar.backends.base import Backend
from quasar.backends.cpu import kernels
from quasar.backends.cpu.backend import CpuBackend, CpuBfloat16Backend
from quasar.backends.reference import ReferenceBackend
from quasar.errors import QuasarError

KV_DEFAULT = "bfloat16"  # on CPU
DEVICES = ("auto", "cpu", "cuda", "npu", "reference")


def get_backend(device: str = "auto", dtype: torch.dtype | None = None, kv: str = "auto") -> Backend:
    """The backend for "auto" | "cpu" | "cuda[:i]" | "npu[:i]" | "reference".

    dtype is that of activations and KV cache; None takes the device's own: float32 on CPU, bfloat16 elsewhere
    (float16 on Ascend inference cards). bfloat16 on CPU is that of the full-precision products alone.
    kv is what the kernels on CPU keep keys and values in, one of KV_FORMATS; "auto" takes KV_DEFAULT.
    Raises QuasarError where the device is unknown or absent.
    """
    if kv not in ("auto", *kernels.KV_FORMATS):
        raise QuasarError(f"--kv {kv} is unknown; use auto or one of {', '.join(kernels.KV_FORMATS)}")
    kind = device.partition(":")[0]
    if kind == "auto":
        device = kind = _best_device()
    if kind != device and kind in ("cpu", "reference"):
        raise QuasarError(f"--device {device} is unknown: {kind} has no number")
    if kind == "cpu" and dtype in (None, torch.float32, torch.bfloat16) and kernels.available():
        chosen = CpuBfloat16Backend if dtype == torch.bfloat16 else CpuBackend
        return chosen(KV_DEFAULT if kv == "auto" else kv)
    if kv != "auto":
        raise QuasarError(f"--kv {kv} needs --device cpu with its C kernels; elsewhere keys and values have --dtype")
    if kind in ("cpu", "reference"):
        return ReferenceBackend("cpu", dtype or torch.float32)
    if kind == "cuda":
        from quasar_gpu import cuda_backend

        return cuda_backend(device, dtype)
    if kind == "npu":
        from quasar_npu.backend import npu_backend

        return npu_backend(device, dtype)
    raise QuasarError(f"--device {device} is unknown; use one of {', '.join(DEVICES)}")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    npu = getattr(torch, "npu", None)  # there once torch_npu has been imported
    return "npu" if npu is not None and npu.is_available() else "cpu"
