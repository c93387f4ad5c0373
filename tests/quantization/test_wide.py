"""Inputs that keep 12 bits as two int8 digits: what they compute, who gets them, and what files say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import QuasarError, load
from quasar.backends import get_backend
from quasar.backends.base import widest
from quasar.backends.cpu import kernels
from quasar.checkpoints import WRITERS
from quasar.checkpoints.compressed_tensors import pack, unpack
from quasar.checkpoints.weights import FullWeights, Int8Weights
from quasar.export.export import quantize_checkpoint
from quasar.export.settings import ExportSettings
from quasar.models.linear import W8A8Linear
from quasar.models.loader import fuse
from quasar.models.model import LoadOptions
from quasar.quantization.methods import W8A8
from quasar.quantization.recipe import Recipe
from quasar.quantization.rounding import to_int8
from quasar.quantization.stream import quantized_decoder
from tests.helpers.random_models import random_model
from tests.helpers.watching import watch

TEXTS = [list(range(start, start + 40)) for start in range(0, 120, 20)]


@settings(max_examples=40)
@given(st.integers(1, 17), st.integers(2, 70), st.integers(1, 50), st.booleans(), st.integers(0, 2**31))
def test_numbers_keep_twelve_bits(tokens: int, inputs: int, out: int, with_bias: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((tokens, inputs), (out, inputs), (out,)))
    made = replace(to_int8(FullWeights(weight, bias if with_bias else None)), wide=True)
    y = W8A8Linear(get_backend("reference"), made)(x)
    weight = made.values.float() * made.scale[:, None]
    most = x.abs().amax(dim=1, keepdim=True) / 2039 / 2 * weight.abs().sum(dim=1) * 1.01 + 1e-4
    assert ((y - torch.nn.functional.linear(x, weight, made.bias)).abs() <= most).all()


def test_a_shifted_input_is_shifted_before_it_gets_its_digits() -> None:
    """As msModelSlim's smoothing leaves them: norms that shift, before layers of 16-bit inputs."""
    weight, shift, x = torch.randn(32, 64), torch.randn(64), torch.randn(5, 64)
    made = replace(to_int8(FullWeights(weight, None)), wide=True)
    shifted = W8A8Linear(get_backend("reference"), replace(made, input_bias=shift))
    assert shifted.activation_quant is None
    assert torch.equal(shifted(x), W8A8Linear(get_backend("reference"), made)(x + shift))
    assert not torch.equal(shifted(x), W8A8Linear(get_backend("reference"), made)(x))


@settings(max_examples=40)
@given(st.integers(1, 5), st.sampled_from([1, 70, 8228, 8229, 12288, 60_000]), st.integers(0, 2**31))
def test_two_digits_are_one_integer(tokens: int, inputs: int, seed: int) -> None:
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    digits = get_backend("reference").digits(x)
    upper, lower = digits.values.int().chunk(2)
    coarse, scale = digits.scale.chunk(2)
    whole = 16 * upper + lower
    assert torch.equal(coarse, 16 * scale)
    assert lower.abs().max() <= 8 and upper.abs().max() <= 127
    assert (whole.abs().amax(dim=1) == widest(inputs)).all()
    assert ((whole * scale[:, None] - x).abs() <= 0.501 * scale[:, None]).all()
    assert widest(inputs) * 128 * inputs < 2**31


@pytest.mark.skipif(not kernels.available(), reason="the C kernels are not built")
@pytest.mark.parametrize("name", kernels.instruction_sets() if kernels.available() else [])
@pytest.mark.parametrize("inputs", [8228, 12288])
def test_the_largest_sums_are_exact(name: str, inputs: int) -> None:
    x = torch.ones(7, inputs)
    x[1:3] *= -3
    values = torch.full((33, inputs), -128, dtype=torch.int8)
    made = Int8Weights(values, torch.ones(33), None, wide=True)
    expected = W8A8Linear(get_backend("reference"), made)(x)
    torch.testing.assert_close(expected[:, 0], -128 * x.sum(dim=1))
    with kernels.use_instruction_set(name):
        assert torch.equal(W8A8Linear(get_backend("cpu"), made)(x), expected)


@pytest.mark.skipif(not kernels.available(), reason="the C kernels are not built")
@pytest.mark.parametrize("name", kernels.instruction_sets() if kernels.available() else [])
@pytest.mark.parametrize("shape", [(1, 32, 64), (5, 70, 96), (33, 40, 130), (3, 16, 7), (70, 33, 1156)])
def test_the_kernel_has_the_bits_of_the_reference(name: str, shape: tuple[int, int, int]) -> None:
    tokens, out, inputs = shape
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, inputs), torch.randn(out, inputs)
    x[0] = 0
    x[-1, 0] = 1000
    made = replace(to_int8(FullWeights(weight, torch.randn(out))), wide=True)
    expected = W8A8Linear(get_backend("reference"), made)(x)
    with kernels.use_instruction_set(name):
        layer = W8A8Linear(get_backend("cpu"), made)
        assert torch.equal(layer(x), expected)
        rows = torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(rows, expected)


@pytest.mark.skipif(not kernels.available(), reason="the C kernels are not built")
@pytest.mark.parametrize("name", kernels.instruction_sets() if kernels.available() else [])
def test_inputs_that_are_not_numbers_stay_so(name: str) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    made = replace(to_int8(FullWeights(torch.randn(32, 64), None)), wide=True)
    with kernels.use_instruction_set(name):
        y = W8A8Linear(get_backend("cpu"), made)(x)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_what_is_wide_is_not_smoothed() -> None:
    model = random_model("qwen3")
    method = W8A8(model.config, 0.5, wide=("qkv", "down"))
    seen = watch(method)
    quantized_decoder(model.config, model.weights, model.decoder.backend, method, TEXTS)
    for (adapted, made), full in zip(seen.values(), model.weights.layers, strict=True):
        assert {name: linear.wide for name, linear in made.linears().items()} == {
            "qkv": True,
            "o": False,
            "gate_up": False,
            "down": True,
        }
        assert torch.equal(adapted.input_norm, full.input_norm)
        assert torch.equal(adapted.down.weight, full.down.weight.float())
        assert not torch.equal(adapted.post_norm, full.post_norm)


def test_wide_inputs_are_nearer_to_full_precision() -> None:
    model = random_model("openpangu")

    def kl(wide: tuple[str, ...]) -> float:
        method = W8A8(model.config, rounding="gptq", wide=wide)
        return quantized_decoder(model.config, model.weights, model.decoder.backend, method, TEXTS, TEXTS)[1].mean_kl

    assert kl(("qkv", "o", "gate_up", "down")) < 0.8 * kl(())


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_int8_is_unpacked(rows: int, words: int, seed: int) -> None:
    values = torch.randint(-128, 128, (rows, 4 * words), generator=torch.Generator().manual_seed(seed))
    values = values.to(torch.int8)
    assert torch.equal(unpack(pack(values, 8), 8), values)


def test_the_first_value_has_the_lowest_bits() -> None:
    assert pack(torch.tensor([[-127, -128, -128, -128]], dtype=torch.int8), 8).tolist() == [[1]]


@pytest.mark.parametrize("name", list(WRITERS))
def test_files_say_which_inputs_are_wide(name: str, tmp_path: Path) -> None:
    made = ExportSettings(format=name, recipe=Recipe(wide=("qkv", "down")))
    texts = ["def main():\n    print('hello')\n" * 8]
    quantize_checkpoint(
        "tiny-qwen3", tmp_path / "out", made, calibration=texts, heldout=texts, options=LoadOptions(device="reference")
    )
    layer = load(str(tmp_path / "out"), device="reference").decoder.layers[0]
    assert [getattr(layer, n).wide for n in ("qkv", "o", "gate_up", "down")] == [True, False, False, True]
    if name == "compressed-tensors":
        fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert fields["format"] == "mixed-precision"
        groups = fields["config_groups"]
        assert [group["format"] for group in groups.values()] == ["int-quantized", "pack-quantized"]
        assert groups["group_1"]["targets"] == [r"re:.*\.(q|k|v|qkv)_proj$", r"re:.*\.down_proj$"]
        assert groups["group_1"]["input_activations"] is None
    else:
        kinds = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
        assert kinds["model.layers.0.self_attn.k_proj.weight"] == "W8A16"
        assert kinds["model.layers.0.mlp.up_proj.weight"] == "W8A8_DYNAMIC"


def test_projections_of_one_input_are_wide_together() -> None:
    part = Int8Weights(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), None)
    with pytest.raises(QuasarError, match="q W8A8, k W8A16: projections of one input"):
        fuse(["q", "k"], [part, replace(part, wide=True)])
