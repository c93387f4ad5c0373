"""Inputs that keep 16 bits as two int8 digits: what they compute, who gets them, and what files say of them."""

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
from quasar.backends.cpu import kernels
from quasar.checkpoints import WRITERS
from quasar.checkpoints.compressed_tensors import pack_int8, unpack_int8
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

TEXTS = [list(range(start, start + 40)) for start in range(0, 120, 20)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(2, 70), st.integers(1, 50), st.booleans(), st.integers(0, 2**31))
def test_numbers_keep_sixteen_bits(tokens: int, inputs: int, out: int, with_bias: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((tokens, inputs), (out, inputs), (out,)))
    made = replace(to_int8(FullWeights(weight, bias if with_bias else None)), wide=True)
    y = W8A8Linear(get_backend("reference"), made)(x)
    weight = made.values.float() * made.scale[:, None]
    # Half a step of the second digit, which is 1 / 254 of the first's.
    most = x.abs().amax(dim=1, keepdim=True) / 127 / 254 / 2 * weight.abs().sum(dim=1) * 1.01 + 1e-4
    assert ((y - torch.nn.functional.linear(x, weight, made.bias)).abs() <= most).all()


@pytest.mark.skipif(not kernels.available(), reason="the C kernels are not built")
@pytest.mark.parametrize("name", kernels.instruction_sets() if kernels.available() else [])
@pytest.mark.parametrize("shape", [(1, 32, 64), (5, 70, 96), (33, 40, 130), (3, 16, 7)])
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
def test_inputs_that_are_not_numbers_stay_so() -> None:
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    made = replace(to_int8(FullWeights(torch.randn(32, 64), None)), wide=True)
    y = W8A8Linear(get_backend("cpu"), made)(x)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_what_is_wide_is_not_smoothed() -> None:
    model = random_model("qwen3")
    seen = {}

    class Looking(W8A8):
        def round(self, adapted, stats):  # type: ignore[no-untyped-def]
            made = super().round(adapted, stats)
            seen[adapted.index] = adapted, made
            return made

    method = Looking(model.config, 0.5, wide=("qkv", "down"))
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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_int8_is_unpacked(rows: int, words: int, seed: int) -> None:
    values = torch.randint(-128, 128, (rows, 4 * words), generator=torch.Generator().manual_seed(seed))
    values = values.to(torch.int8)
    assert torch.equal(unpack_int8(pack_int8(values)), values)


def test_the_first_value_has_the_lowest_bits() -> None:
    assert pack_int8(torch.tensor([[-127, -128, -128, -128]], dtype=torch.int8)).tolist() == [[1]]


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
