"""Inputs that stay in 16 bits: the right ones, within the budget, by their names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quasar.checkpoints.weights import FullWeights, Int8Weights, ModelWeights
from quasar.quantization.budget import choose_kept
from quasar.quantization.methods import W8A8
from quasar.quantization.stream import quantized_decoder
from tests.conftest import FAMILIES
from tests.helpers.random_models import random_model
from tests.helpers.watching import watch

TEXTS = [list(range(start, start + 40)) for start in range(0, 120, 20)]


def with_an_outlier(family: str) -> tuple[ModelWeights, object, object]:
    """A random model whose layer 2 has a down projection that int8 activations ruin: one loud channel among all."""
    model = random_model(family)
    layer = model.weights.layers[2]
    half = len(layer.gate_up.weight) // 2
    gate_up, down = layer.gate_up.weight.float().clone(), layer.down.weight.float().clone()
    gate_up[half + 5] *= 4000  # of up: the input of down's channel 5
    down[:, 5] /= 4000
    gate_up = replace(layer.gate_up, weight=gate_up)
    model.weights.layers[2] = layer.convert({"gate_up": gate_up, "down": replace(layer.down, weight=down)})
    return model.weights, model.config, model.decoder.backend


@pytest.mark.parametrize("family", FAMILIES)
def test_the_worst_input_is_kept_and_pays(family: str) -> None:
    weights, config, backend = with_an_outlier(family)
    method = W8A8(config, smooth=False)
    size = weights.layers[2].down.weight.numel() * (config.dtype.itemsize - 1)
    kept = choose_kept(config, weights, backend, method, TEXTS, size)
    assert [(each.layer, each.name, each.nbytes) for each in kept] == [(2, "down", size)]
    _, without = quantized_decoder(config, weights, backend, method, TEXTS, TEXTS)
    keeping = W8A8(config, smooth=False, keep=[(2, "down")])
    _, fidelity = quantized_decoder(config, weights, backend, keeping, TEXTS, TEXTS)
    assert fidelity.mean_kl < 0.7 * without.mean_kl


def test_what_is_kept_is_full_precision_and_smoothed_as_the_others() -> None:
    model = random_model("qwen3")
    method = W8A8(model.config, keep=[(1, "o")])
    seen = watch(method)
    quantized_decoder(model.config, model.weights, model.decoder.backend, method, TEXTS)
    for index, (_, made) in seen.items():
        kinds = {name: type(linear) for name, linear in made.linears().items()}
        assert kinds.pop("o") is (FullWeights if index == 1 else Int8Weights)
        assert set(kinds.values()) == {Int8Weights}
    adapted, made = seen[1]
    assert torch.equal(made.o.weight, adapted.o.weight.to(model.config.dtype))
