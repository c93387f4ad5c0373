"""Verification windows on CPU as recorded passes: one call into C instead of hundreds.

The pass runs through the decoder once for each window size, and its kernel calls are recorded (kernels.Recording); the
next window of that size makes them again, over whichever KV cache. What would not be repeated, any operation of
PyTorch's own, is refused while recording: then the decoder's windows go on running plainly.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quasar.backends.base import Forward, KVCache
from quasar.backends.cpu import kernels

_LONGEST = 16  # tokens: longer passes are bound by arithmetic, and each recording keeps its logits


class RecordedPasses(threading.local):
    """A decoder's recordings; each thread has its own, since a recording is one piece of memory."""

    def __init__(self) -> None:
        self._passes: dict[tuple[Any, ...], _RecordedPass] = {}  # by tokens, keep, threads, instruction set
        self._possible = True

    def run(self, forward: Forward, cache: KVCache, ids: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, vocab], overwritten by the next window of this size."""
        if not self._possible or not keep or len(ids) > _LONGEST:
            return forward(torch.tensor(ids), cache, keep)
        key = (len(ids), keep, torch.get_num_threads(), kernels.instruction_set())
        if key in self._passes:
            return self._passes[key].replay(cache, ids)
        try:
            recorded = self._passes[key] = _RecordedPass(forward, cache, ids, keep)
        except NotImplementedError:
            self._possible = False
            return forward(torch.tensor(ids), cache, keep)
        return recorded.logits


_recorded: WeakKeyDictionary[Any, RecordedPasses] = WeakKeyDictionary()


def recorded_passes(forward: Forward) -> RecordedPasses:
    """Those of this decoder; they go with it."""
    return _recorded.setdefault(forward, RecordedPasses())


class _RecordedPass:
    def __init__(self, forward: Forward, cache: KVCache, ids: Sequence[int], keep: int) -> None:
        self._ids = torch.tensor(ids)
        with kernels.recording(cache.k, cache.v) as self._recording, _KernelsOnly():
            self.logits = forward(self._ids, cache, keep)

    def replay(self, cache: KVCache, ids: Sequence[int]) -> Tensor:
        if len(ids) > cache.free:
            raise ValueError(f"{len(ids)} tokens do not fit the KV cache: {cache.free} positions are free")
        self._ids.copy_(torch.tensor(ids))
        self._recording.replay(cache.length, cache.k, cache.v)
        return self.logits


class _KernelsOnly(TorchDispatchMode):
    """Refuses, with NotImplementedError, every operation of PyTorch's that computes: a replay would leave it out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and importing what would skip it takes a second

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func is torch.ops.aten.empty.memory_format:
            return func(*args, **(kwargs or {}))
        raise NotImplementedError(f"{func} is no kernel of ours")
