"""Finding the card, and one plain line where it is missing, too old or too full."""

from __future__ import annotations

import re

import torch

from quasar.errors import QuasarError
from quasar.memory import gigabytes

_LEAST_CAPABILITY = (8, 0)  # Ampere: what Triton compiles for; int8 tensor cores and bfloat16 are there too


def open_cuda(device: str) -> torch.device:
    """The card that "cuda" or "cuda:1" names. Raises QuasarError where it cannot be used."""
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise QuasarError(f"--device {device}: write cuda, or cuda:1 for the second card")
    if torch.version.cuda is None:
        raise QuasarError(
            f"--device {device}: torch {torch.__version__} is built without CUDA; install a CUDA build "
            "(pytorch.org/get-started), or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise QuasarError(f"--device {device}: no CUDA device here (nvidia-smi lists them); use --device cpu")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise QuasarError(f"--device {device}: CUDA devices here: {count}, counted from 0")
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        raise QuasarError(
            f"--device {device}: {torch.cuda.get_device_name(index)} has compute capability {_dotted(capability)}; "
            f"the kernels need {_dotted(_LEAST_CAPABILITY)} (Ampere) or newer; use another card, or --device cpu"
        )
    _require_triton(device)
    return torch.device("cuda", index)


def _require_triton(device: str) -> None:
    try:
        import triton  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuasarError(
            f"--device {device}: Triton does not load ({reason}); CUDA builds of torch for Linux bring it, "
            "pip install triton; or use --device cpu"
        ) from None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def require_free(device: torch.device, nbytes: int, what: str) -> None:
    """Raises QuasarError unless the card has `nbytes` free for `what`; memory that torch only holds back counts."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if nbytes > free:
        raise QuasarError(
            f"{what} needs {gigabytes(nbytes)}, and {gigabytes(free)} of {gigabytes(total)} are free on {device} "
            f"({torch.cuda.get_device_name(device)})"
        )
