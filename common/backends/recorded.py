"""Verification windows on CPU as recorded passes: one call into C instead of hundreds.

The pass runs through the decoder once for each window size, and its kernel calls are recorded (native.Recording); the
next window of that size makes them again. What would not be repeated, any operation of PyTorch's own, is refused while
recording: then windows go on running plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.backends import native
from common.backends.base import Forward, KVCache, WindowPass

_LONGEST = 16  # tokens: longer passes are bound by arithmetic, and each recording keeps its logits


class RecordedWindows:
    """The window pass of one sequence; the logits of a size are overwritten by its next window."""

    def __init__(self, forward: Forward, cache: KVCache, plain: WindowPass) -> None:
        self._forward, self._cache, self._plain = forward, cache, plain
        self._passes: dict[tuple[int, int, int], _RecordedPass] = {}  # by tokens, keep, threads
        self._possible = True

    def __call__(self, ids: Sequence[int], keep: int) -> Tensor:
        if not self._possible or not keep or len(ids) > _LONGEST:
            return self._plain(ids, keep)
        key = (len(ids), keep, torch.get_num_threads())
        if key in self._passes:
            return self._passes[key].replay(ids)
        try:
            recorded = self._passes[key] = _RecordedPass(self._forward, self._cache, ids, keep)
        except NotImplementedError:
            self._possible = False
            return self._plain(ids, keep)
        return recorded.logits


class _RecordedPass:
    def __init__(self, forward: Forward, cache: KVCache, ids: Sequence[int], keep: int) -> None:
        self._cache = cache
        self._ids = torch.tensor(ids)
        with native.recording() as self._recording, _KernelsOnly():
            self.logits = forward(self._ids, cache, keep)

    def replay(self, ids: Sequence[int]) -> Tensor:
        if len(ids) > self._cache.free:
            raise ValueError(f"{len(ids)} tokens do not fit the KV cache: {self._cache.free} positions are free")
        self._ids.copy_(torch.tensor(ids))
        self._recording.replay(self._cache.length)
        return self.logits


class _KernelsOnly(TorchDispatchMode):
    """Refuses, with NotImplementedError, every operation of PyTorch's that computes: a replay would leave it out."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func is torch.ops.aten.empty.memory_format:
            return func(*args, **(kwargs or {}))
        raise NotImplementedError(f"{func} is no kernel of ours")
