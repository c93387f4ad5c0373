"""A second decoder over the tensors of a first: the same model with fewer layers, or in another precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quasar.models.decoder import Decoder, DecoderLayer
from quasar.models.linear import Linear


def share(
    decoder: Decoder, *, keep: Sequence[int] | None = None, convert: Callable[[Linear], Linear] | None = None
) -> Decoder:
    """A decoder of the layers `keep` (None: all), its layers' linear modules passed through `convert`.

    No tensor is copied. Layers keep their index, so both decoders read and write the same places of a KV cache.
    """

    def converted(linear: Linear) -> Linear:
        return linear if convert is None else convert(linear)

    layers = [
        DecoderLayer(
            layer.index,
            layer.attention,
            layer.eps,
            layer.backend,
            input_norm=layer.input_norm,
            qkv=converted(layer.qkv),
            o=converted(layer.o),
            post_norm=layer.post_norm,
            gate_up=converted(layer.gate_up),
            down=converted(layer.down),
        )
        for layer in decoder.layers
        if keep is None or layer.index in keep
    ]
    return Decoder(
        decoder.config,
        decoder.backend,
        embedding=decoder.embedding,
        layers=layers,
        norm=decoder.norm,
        lm_head=decoder.lm_head,
    )
