"""What keys and values in fewer bits do to a model, on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quasar.models.decoder import Decoder
from quasar.models.fidelity import Fidelity
from quasar.quantization.fidelity import FidelityTally, held_out

_TOKENS = 512


def kv_fidelity(decoder: Decoder, texts: Iterable[Sequence[int]]) -> Fidelity:
    """Of the format that the decoder's backend keeps keys and values in, against float32, on the CPU backend."""
    c = decoder.config
    tally = FidelityTally()
    for ids in held_out(texts, c.vocab_size, c.max_position_embeddings, _TOKENS):
        found = decoder.read(ids[:-1], len(ids) - 1)
        with decoder.backend.exact_kv():
            exact = decoder.read(ids[:-1], len(ids) - 1)
        tally.add(exact.log_softmax(dim=-1), found.log_softmax(dim=-1), ids[1:])
    return tally.figures()
