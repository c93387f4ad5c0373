"""int4 weights: the kernel computes what the integers say, rows do not see each other, rotations change nothing."""

from __future__ import annotations

import pytest
import torch

from quasar.backends.base import Quantized
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints.weights import FullWeights
from quasar.errors import QuasarError
from quasar.models.linear_int4 import W4A4Linear, W4A16Linear
from quasar.quantization.fidelity import FidelityProbe
from quasar.quantization.int4 import lies_on_grid, quantize_weight_int4, to_int4
from quasar.quantization.methods import Int4
from quasar.quantization.rotation import hadamard, rotate_last
from quasar.quantization.stream import quantized_decoder
from tests.conftest import FAMILIES
from tests.helpers.passes import forward, new_slot
from tests.helpers.random_models import random_model, shared_random_model


def _dequantised(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    grouped = values.float().view(len(values), scale.shape[1], -1) * scale.float()[..., None]
    return grouped.flatten(1)


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 64), (96, 32)])
def test_weight_rounding_error_is_within_half_a_step_or_the_clip(inputs, group):
    weight = torch.randn(48, inputs, generator=torch.Generator().manual_seed(1))
    values, scale = quantize_weight_int4(weight)
    assert values.abs().max() <= 7 and scale.shape == (48, inputs // group)
    error = (_dequantised(values, scale) - weight).view(48, -1, group)
    peak = weight.view(48, -1, group).abs().amax(-1, keepdim=True)
    # Clipping at 0.75 of the peak moves the largest weight by a quarter; bfloat16 scales move it 0.4 % more.
    assert (error.abs() <= torch.maximum(scale.float()[..., None] / 2, 0.26 * peak)).all()
    plain = (weight.view(48, -1, group) / (peak / 7)).round() * (peak / 7)
    assert error.square().sum() < (plain - weight.view(48, -1, group)).square().sum()


@pytest.mark.parametrize("shape", [(17, 128), (16, 48)])
def test_shapes_without_a_kernel_are_refused_in_one_line(shape):
    with pytest.raises(QuasarError, match="cannot be int4"):
        quantize_weight_int4(torch.ones(shape))


def test_zero_groups_stay_zero():
    values, scale = quantize_weight_int4(torch.zeros(16, 128))
    assert not values.any() and (scale == 1).all()


def test_kernel_against_the_integers():
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-8, 8, (32, 256), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, 2, generator=generator).bfloat16()
    x = torch.randn(5, 256, generator=generator).bfloat16().float()
    bias = torch.randn(32, generator=generator)
    backend = ReferenceBackend()
    y = backend.int4_linear(x, backend.int4_weight(values, scale), bias)
    expected = x @ _dequantised(values, scale).t() + bias
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=0.03)  # outputs near 40, rounded to bfloat16


def test_other_devices_say_what_they_have():
    with pytest.raises(QuasarError, match="--device mps has --precision full and w8a8"):
        ReferenceBackend("mps").int4_weight(torch.zeros(16, 128, dtype=torch.int8), torch.ones(16, 1).bfloat16())


def test_int4_activations_take_fifteen_values():
    x = torch.tensor([[7.0, -3.4, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    q = ReferenceBackend().quantize_int4(x)
    assert q.values.tolist() == [[7, -3, 0, 0], [0, 0, 0, 0]] and q.scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("linear", [W4A16Linear, W4A4Linear])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_row_does_not_depend_on_the_window_it_is_in(linear, rotated):
    weight = torch.randn(96, 768, generator=torch.Generator().manual_seed(3))
    layer = linear.of(ReferenceBackend(), to_int4(FullWeights(weight, None, hadamard(768, 128) if rotated else None)))
    x = torch.randn(16, 768, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([layer(row) for row in x.split(1)])
    for tokens in (2, 3, 6, 11, 16):
        assert torch.equal(layer(x[:tokens]), alone[:tokens])


def test_both_activations_share_one_weight():
    layer = W4A16Linear.of(ReferenceBackend(), to_int4(FullWeights(torch.randn(32, 128), None, hadamard(128))))
    other = W4A4Linear.over(layer)
    assert other.packed is layer.packed and other.nbytes == layer.nbytes
    x = torch.randn(3, 128)
    quantized = ReferenceBackend().quantize_int4(ReferenceBackend().rotate(x, hadamard(128)))
    assert isinstance(quantized, Quantized)
    assert torch.equal(other(x), layer.backend.int4_linear(quantized, layer.packed, None))
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("features", "limit", "block"), [(256, None, 256), (768, None, 256), (768, 128, 128), (96, 128, 32)]
)
def test_hadamard_is_its_own_inverse(features, limit, block):
    matrix = hadamard(features, limit)
    assert matrix.shape == (block, block)
    torch.testing.assert_close(matrix @ matrix, torch.eye(block))
    outlier = torch.zeros(1, features)
    outlier[0, 3] = 1.0
    assert rotate_last(outlier, matrix).abs().max() == pytest.approx(block**-0.5)


class _RotationAlone(Int4):
    """Rotates, and rounds nothing."""

    def round(self, adapted, stats):
        return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_changes_nothing_in_full_precision(family):
    model = random_model(family)
    probe = FidelityProbe(model.decoder, [list(range(60))])
    method = _RotationAlone(model.config)
    rotated, _ = quantized_decoder(model.config, model.weights, model.decoder.backend, method, [])
    assert probe.compare(rotated).mean_kl < 1e-6
    assert not torch.allclose(rotated.embedding, model.decoder.embedding)
    assert probe.compare(model.decoder).mean_kl == 0  # the original was not touched


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_gives_the_logits_of_single_steps_bit_for_bit(family, precision):
    decoder = shared_random_model(family, precision).decoder
    ids = torch.arange(3, 15)
    together, alone = new_slot(decoder, 20), new_slot(decoder, 20)
    rows = []
    for token in ids:
        rows.append(forward(decoder, alone, token[None]))
        alone.commit(1)
    assert torch.equal(forward(decoder, together, ids), torch.cat(rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_models_at_four_bits(family, shipped):
    w8, w4a16, w4a4 = (shipped(family, precision) for precision in ("w8a8", "w4a16", "w4a4"))
    kl = [model.fidelity.mean_kl for model in (w8, w4a16, w4a4)]
    assert kl == sorted(kl) and kl[2] < 0.2
    layers = [sum(linear.nbytes for linear in model.decoder.linears()[:-1]) for model in (w8, w4a16, w4a4)]
    assert layers[1] == layers[2] and 0.5 < layers[1] / layers[0] < 0.65


def test_weights_that_lie_on_an_int4_grid_are_not_rotated():
    """Rotated they would leave the grid of the 4-bit file that they came from."""
    g = torch.Generator().manual_seed(5)
    values = torch.randint(0, 16, (64, 4, 32), generator=g).float()
    values[..., 0], values[..., 1] = 0, 15
    weight = (values * 0.01 - torch.rand(64, 4, 1, generator=g) * 0.1).flatten(1)
    assert lies_on_grid(FullWeights(weight, None))
    assert not lies_on_grid(FullWeights(torch.randn(64, 128, generator=g), None))
    assert not lies_on_grid(FullWeights(rotate_last(weight, hadamard(128)), None))
    assert not lies_on_grid(FullWeights(weight[:, :40], None))
