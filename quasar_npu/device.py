"""Finding the NPU: torch_npu, its chip, and one plain line where either is missing."""

from __future__ import annotations

import importlib.util
import re
import warnings

import torch

from quasar.errors import QuasarError

# What get_device_name says, in which nobody has found another chip: Atlas A2, A3, and inference cards.
_TRAINING_CHIPS = re.compile(r"Ascend910B[1-9]\w?(-\d)?$|Ascend910_93\w*$")
_INFERENCE_CARDS = re.compile(r"Ascend310P\w*$")


def import_torch_npu() -> None:
    """Makes `torch.npu` and `torch.ops.npu` usable. Raises QuasarError that says what to install or source."""
    if importlib.util.find_spec("torch_npu") is None:
        raise QuasarError(
            f"no torch-npu here; pip install torch-npu for torch {torch.__version__.partition('+')[0]}, "
            "or use --device cpu"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of CANN's folders, which run_ascend.sh checks
            import torch_npu  # noqa: F401
    except (ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise QuasarError(
            f"torch-npu does not load ({reason}); install CANN and source its set_env.sh (scripts/run_ascend.sh does)"
        ) from None


def open_npu(device: str) -> tuple[torch.device, str]:
    """The device that "npu" or "npu:1" names, and the name of its chip, as "Ascend910B2"."""
    try:
        import_torch_npu()
    except QuasarError as error:
        raise QuasarError(f"--device {device}: {error}") from None
    if not torch.npu.is_available():
        raise QuasarError(f"--device {device}: no NPU here (npu-smi info lists them); use --device cpu")
    try:
        index = torch.device(device).index or 0
    except RuntimeError:
        raise QuasarError(f"--device {device}: write npu, or npu:1 for the second NPU") from None
    if index >= torch.npu.device_count():
        raise QuasarError(f"--device {device}: there are {torch.npu.device_count()} NPUs, counted from 0")
    soc = torch.npu.get_device_name(index)
    if chip_kind(soc) is None:
        raise QuasarError(
            f"--device {device}: {soc} is a chip that Quasar does not know; it runs on Ascend910B1 to 910B9 "
            "(Atlas A2), Ascend910_93... (A3) and Ascend310P... (inference cards)"
        )
    torch.npu.set_device(index)
    # Without it a cast to FRACTAL_NZ is silently left undone by CANN before 9.1.
    torch.npu.config.allow_internal_format = True
    if is_inference_card(soc):
        # There the default compiles every operator at its first call, for minutes.
        torch.npu.set_compile_mode(jit_compile=False)
    return torch.device("npu", index), soc


def chip_kind(soc: str) -> str | None:
    """ "A2 or A3", "inference card", or None for a chip that nobody has looked at."""
    if _INFERENCE_CARDS.match(soc):
        return "inference card"
    return "A2 or A3" if _TRAINING_CHIPS.match(soc) else None


def is_inference_card(soc: str) -> bool:
    """Atlas 300I and its kin: float16, no fused attention."""
    return chip_kind(soc) == "inference card"
