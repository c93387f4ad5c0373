"""A decoder that is ready to run: it owns the slots, the captured passes and the measured costs of one decoder."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.backends.base import Backend, Batch, Segment, Slot
from quasar.backends.capture import CapturedPasses
from quasar.errors import QuasarError
from quasar.models.config import ModelConfig
from quasar.models.costs import SIZES, PassCosts, measure
from quasar.models.decoder import CHUNK_ROWS, Decoder

PROMPT_ROWS = CHUNK_ROWS  # of a prompt in one pass
_CONTEXT_TIMED = 16  # positions before the rows whose passes are timed


class Runtime:
    """One decoder on one device. Whoever runs passes holds `lock` until it has read their logits."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.lock = threading.RLock()
        self._passes = CapturedPasses(decoder.backend, decoder)
        self._costs: PassCosts | None = None
        _runtimes.add(self)

    @property
    def backend(self) -> Backend:
        return self.decoder.backend

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def new_slot(self, capacity: int) -> Slot:
        """An empty slot. Raises QuasarError beyond the positions that the model has rotary embeddings for."""
        c = self.config
        if not 0 < capacity <= c.max_position_embeddings:
            most = c.max_position_embeddings
            raise QuasarError(f"a context of {capacity} tokens is more than this model has positions for: {most}")
        return self.backend.new_slot(c.num_layers, c.num_kv_heads, capacity, c.head_dim)

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of keys and values of one position, all layers together."""
        return self.backend.kv_bytes(self.config.num_layers, self.config.num_kv_heads, self.config.head_dim)

    def run(self, batch: Batch) -> Tensor:
        """One pass: logits float32 [kept rows, vocab], valid until the next one. The caller commits."""
        return self._passes.run(batch)

    @property
    def settled(self) -> bool:
        """Whether the latest pass took what such passes take: not the first of its kind, which is captured."""
        return self._passes.settled

    def prefill(self, slot: Slot, ids: Sequence[int], logits_to_keep: int = 1) -> Tensor:
        """Commits a text to a slot, PROMPT_ROWS at a time.

        Returns logits float32 [logits_to_keep, vocab] of its last tokens.
        """
        kept = []
        for first in range(0, len(ids), PROMPT_ROWS):
            chunk = ids[first : first + PROMPT_ROWS]
            keep = min(len(chunk), max(0, logits_to_keep - (len(ids) - first - len(chunk))))
            kept.append(self.run(Batch([Segment(slot, chunk, logits_to_keep=keep)])).clone())
            slot.commit(len(chunk))
        return torch.cat(kept)

    @property
    def costs(self) -> PassCosts:
        """Seconds of a pass by its rows; the first look takes a few passes of each size."""
        with self.lock:
            if self._costs is None:
                self._costs = self._measure_costs()
            return self._costs

    @property
    def costs_known(self) -> bool:
        return self._costs is not None

    def _measure_costs(self) -> PassCosts:
        positions = self.config.max_position_embeddings
        most = max(1, min(SIZES[-1], positions - _CONTEXT_TIMED))
        slot = self.new_slot(min(_CONTEXT_TIMED + most, positions))
        if slot.capacity > most:
            self.prefill(slot, [0] * (slot.capacity - most), logits_to_keep=0)

        def timed(rows: int) -> float:
            batch = Batch([Segment(slot, [0] * rows, logits_to_keep=rows)])
            self.backend.synchronize()
            clock = time.perf_counter()
            self.backend.argmax(self.run(batch)).tolist()
            return time.perf_counter() - clock

        return measure(timed, most)


_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked process has one thread: OpenMP's team is gone, and a lock that another thread held never opens."""
    if _runtimes:
        torch.set_num_threads(1)
    for runtime in list(_runtimes):
        runtime.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
