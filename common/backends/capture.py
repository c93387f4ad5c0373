"""Passes that come again: the one policy for CPU recordings, CUDA graphs and NPU graphs.

A kind of pass (`Backend.pass_key`) runs plainly as often as its device wants, is captured once, and is replayed ever
after. Where a device cannot capture the decoder, its passes go on running plainly.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from quasar.backends.base import Backend, Batch, CapturedPass, Forward

_MOST = 128  # captured passes that are kept; the one that was not used for longest goes first

log = logging.getLogger(__name__)


class CapturedPasses:
    """Those of one decoder on one device."""

    def __init__(self, backend: Backend, forward: Forward) -> None:
        self._backend, self._forward = backend, forward
        self._passes: OrderedDict[Hashable, CapturedPass] = OrderedDict()
        self._runs: dict[Hashable, int] = {}
        self._possible = True
        self.settled = False  # whether the latest run was of a kind that runs alike from now on

    def run(self, batch: Batch) -> Tensor:
        """Logits float32 [kept rows, vocab], valid until the next run."""
        key = self._backend.pass_key(batch) if self._possible else None
        self.settled = key is None or key in self._passes
        if key is None:
            return self._plain(batch)
        if key in self._passes:
            self._passes.move_to_end(key)
            return self._passes[key].replay(batch)
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] <= self._backend.runs_before_capture:
            return self._plain(batch)
        try:
            captured = self._backend.capture(self._forward, batch)
        except (NotImplementedError, RuntimeError) as error:
            self._possible = False
            if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
                name, reason = self._backend.name, _first_line(error)
                log.warning("%s: a pass could not be captured (%s); passes run plainly", name, reason)
            return self._plain(batch)
        self._passes[key] = captured
        if len(self._passes) > _MOST:
            self._passes.popitem(last=False)
        return captured.logits

    def _plain(self, batch: Batch) -> Tensor:
        return self._forward(self._backend.token_ids(batch.ids), batch)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
