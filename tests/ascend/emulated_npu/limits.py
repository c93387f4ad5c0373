"""What the emulated chip accepts: its name, its family, and the words in which it refuses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FRACTAL_NZ = 29
_FAMILIES = {"Ascend910B": "A2", "Ascend910_93": "A3", "Ascend310P": "inference card"}
_soc = os.environ.get("QUASAR_ASCEND_SOC") or "Ascend910B2"


class Refused(RuntimeError):
    """The hardware's documentation rules this call out."""


class NotEmulated(NotImplementedError):
    """The hardware may well take this call; the emulation does not know it."""


def soc_name() -> str:
    """The chip whose limits apply."""
    return _soc


@contextmanager
def soc_as(name: str) -> Iterator[None]:
    """Apply another chip's operator limits inside the block.

    torch_npu itself reads the name once per process, so code that asks it which chip this is needs a process
    started with ``QUASAR_ASCEND_SOC`` instead.
    """
    global _soc
    before, _soc = _soc, name
    try:
        yield
    finally:
        _soc = before


def is_inference_card() -> bool:
    """True for Atlas 300I and its kin; Atlas A2 and A3 share one table, so nothing else is asked."""
    family = next((family for prefix, family in _FAMILIES.items() if _soc.startswith(prefix)), None)
    if family is None:
        raise NotEmulated(f"no table of limits for {_soc}")
    return family == "inference card"


def need(condition: bool, message: str) -> None:
    """Refuse with the message unless the condition holds."""
    if not condition:
        raise Refused(message)


def need_emulated(condition: bool, message: str) -> None:
    """Say that the emulation lacks something unless the condition holds."""
    if not condition:
        raise NotEmulated(message)


def need_training_card(operator: str) -> None:
    """Refuse an operator that only Atlas A2 and A3 have."""
    need(not is_inference_card(), f"{operator} does not exist on {_soc}")


def need_dtype(name: str, tensor: torch.Tensor | None, *allowed: torch.dtype) -> None:
    """Refuse a tensor (absent ones pass) whose dtype is not listed; bfloat16 never is on inference cards."""
    if tensor is None:
        return
    if is_inference_card():
        allowed = tuple(dtype for dtype in allowed if dtype != torch.bfloat16)
    need(tensor.dtype in allowed, f"{name} is {tensor.dtype}, {_soc} takes {', '.join(map(str, allowed))}")


def need_same_dtype(**tensors: torch.Tensor | None) -> None:
    """Refuse a mix of dtypes among tensors that must agree (absent ones pass)."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    need(len(set(dtypes.values())) <= 1, f"dtypes must agree: {dtypes}")


def need_shape(name: str, tensor: torch.Tensor | None, *allowed: tuple[int, ...]) -> None:
    """Refuse a tensor (absent ones pass) whose shape is not listed."""
    if tensor is not None:
        need(tuple(tensor.shape) in allowed, f"{name} has shape {tuple(tensor.shape)}, not one of {allowed}")


def is_fractal(tensor: torch.Tensor) -> bool:
    """True for (the host view of) a weight in FRACTAL_NZ format."""
    return getattr(tensor, "npu_format", None) == FRACTAL_NZ
