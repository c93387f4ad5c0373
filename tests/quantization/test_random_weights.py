"""Random weights, which are there to be timed: quantised at once, into what a real model's pass would read."""

from __future__ import annotations

import pytest
import torch

from quasar.backends import get_backend
from quasar.models.config import read_config
from quasar.models.loader import CheckpointWeights, RandomTensors
from quasar.models.model import find_checkpoint
from quasar.quantization.methods import W8A8, Int4, SameLayers
from quasar.quantization.stream import LayerQuantizer


@pytest.mark.parametrize("precision", ["w8a8", "int4"])
def test_layers_are_those_of_the_method_and_share_no_memory(precision):
    config = read_config(find_checkpoint("tiny-qwen3"))
    backend = get_backend("reference")
    weights = CheckpointWeights(config, RandomTensors(torch.bfloat16), backend.place)
    method = W8A8(config, smooth=False) if precision == "w8a8" else Int4(config, group=32, symmetric=False)
    quantizer = LayerQuantizer(config, weights, backend, SameLayers(method), [])
    states = quantizer.start()
    layers = [quantizer.layer(index, states)[0] for index in range(2)]
    expected = method.round(method.prepare(weights.layer(0)), {})
    memory = set()
    for layer in layers:
        for name, made in layer.linears().items():
            assert torch.equal(made.values, getattr(expected, name).values)
            memory.add(made.values.data_ptr())
    assert len(memory) == 2 * len(layers[0].linears()) and [layer.index for layer in layers] == [0, 1]
