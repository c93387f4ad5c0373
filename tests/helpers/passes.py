"""Single passes of a decoder, without a runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.backends.base import Batch, Segment, Slot
from quasar.models.decoder import Decoder


def new_slot(decoder: Decoder, capacity: int) -> Slot:
    c = decoder.config
    return decoder.backend.new_slot(c.num_layers, c.num_kv_heads, capacity, c.head_dim)


def forward(
    decoder: Decoder,
    slot: Slot,
    ids: Sequence[int] | Tensor,
    logits_to_keep: int | None = None,
    parents: Sequence[int] | None = None,
) -> Tensor:
    """Logits [logits_to_keep, vocab] (None: of all rows) of a pass over one segment. Commits nothing."""
    ids = torch.as_tensor(ids).tolist()
    keep = len(ids) if logits_to_keep is None else logits_to_keep
    batch = Batch([Segment(slot, ids, parents, keep)])
    return decoder(torch.tensor(ids, device=decoder.backend.device), batch)


def committed(decoder: Decoder, capacity: int, ids: Sequence[int] | Tensor) -> Slot:
    """A slot that holds `ids`."""
    slot = new_slot(decoder, capacity)
    forward(decoder, slot, ids, 0)
    slot.commit(len(ids))
    return slot
