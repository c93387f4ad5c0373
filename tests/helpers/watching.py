"""What a quantiser makes of a model, layer by layer."""

from __future__ import annotations

from quasar.checkpoints.weights import LayerWeights
from quasar.quantization.methods import Method


def watch(method: Method) -> dict[int, tuple[LayerWeights, LayerWeights]]:
    """Fills, as the method runs: each layer's (weights as they are rounded, what they became)."""
    seen = {}
    round_layer = method.round

    def watched(adapted, stats):  # type: ignore[no-untyped-def]
        made = round_layer(adapted, stats)
        seen[adapted.index] = adapted, made
        return made

    method.round = watched  # type: ignore[method-assign]
    return seen
