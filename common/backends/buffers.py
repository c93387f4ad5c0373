"""Memory for the intermediate results of a pass that will be repeated at the same addresses.

A pass that is recorded once and replayed (a CUDA graph, the C kernels' own recording) keeps the addresses it saw. Were
each result a fresh tensor, a pass would hold one per operation; here a tensor that nothing refers to any more is
handed out again, so that a pass of any depth holds a handful and they stay in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors by shape and type, each of them reused once nothing outside refers to it.

    Whoever keeps the memory through a view must keep the tensor itself too: views are not seen.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of unknown contents."""
        tensors = self._tensors.setdefault((shape, dtype), [])
        for index in range(len(tensors)):
            if unused(tensors, index):
                return tensors[index]
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        tensors.append(tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(t.nbytes for tensors in self._tensors.values() for t in tensors)


def unused(objects: Sequence[object], index: int) -> bool:
    """Whether nothing but the list refers to that object."""
    return _references(objects, index) == _UNUSED


def _references(objects: Sequence[object], index: int) -> int:
    return sys.getrefcount(objects[index])


_UNUSED = _references([object()], 0)  # differs between Python versions
