"""Checkpoints that the real tools wrote load, and say what the model they were made of says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quasar import Model, QuasarError, generate, load
from quasar.models.linear import W8A8Linear
from quasar.models.linear_int4 import W4A16Linear
from quasar.quantization.fidelity import FidelityProbe

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["def main():\n    print('hello world')\n", "The quick brown fox jumps over the lazy dog, 1234567890 times."]
# mean KL in nats that each may differ by: what they do differ by, with room for other processors' rounding
MADE = {
    "msmodelslim-dynamic": 4e-4,
    "msmodelslim-mix": 4e-4,
    "msmodelslim-static": 8e-4,
    "msmodelslim-static-fp16": 8e-4,
    "llm-compressor": 4e-4,
    "llm-compressor-static": 8e-4,
    "msmodelslim-w4a16": 2e-2,
}


@pytest.fixture(scope="module")
def full() -> Model:
    return load(str(GOLDEN / "small-qwen3"), device="reference")


@pytest.mark.parametrize("name", MADE)
def test_what_the_tools_wrote_agrees_with_the_float_model(name: str, full: Model) -> None:
    model = load(str(GOLDEN / name), device="reference")
    precision, kind = ("w4a16", W4A16Linear) if "w4a16" in name else ("w8a8", W8A8Linear)
    assert model.precision == precision
    assert all(isinstance(linear, kind) for linear in model.decoder.linears()[:-1])
    probe = FidelityProbe(full.decoder, [full.encode(text) for text in TEXTS])
    fidelity = probe.compare(model.decoder)
    assert 0 < fidelity.mean_kl < MADE[name]
    assert len(generate(model, "Hello", max_new_tokens=5).result().token_ids) == 5


@pytest.mark.parametrize("part", ["input_layernorm.bias", "self_attn.q_proj.bias"])
def test_shifts_and_their_biases_both_count(
    part: str, full: Model, golden: Callable[[str], Path], edit: Callable[..., None]
) -> None:
    """The thresholds above would notice if one of them were left out."""
    folder = golden("msmodelslim-dynamic")
    edit(folder, {f"model.layers.0.{part}": torch.zeros_like})
    probe = FidelityProbe(full.decoder, [full.encode(text) for text in TEXTS])
    assert probe.compare(load(str(folder), device="reference").decoder).mean_kl > 2 * MADE["msmodelslim-dynamic"]


def test_int64_and_float32_scales_mean_the_same() -> None:
    """fp16 models carry deq_scale as a float32's bits."""
    layers = [
        load(str(GOLDEN / name), device="reference").decoder.layers[0].o
        for name in ("msmodelslim-static", "msmodelslim-static-fp16")
    ]
    scales = [layer.packed[1] * layer.static_scale for layer in layers]
    torch.testing.assert_close(*scales, rtol=0.02, atol=0)


def test_a_quantised_checkpoint_is_not_quantised_again_nor_run_as_full_precision() -> None:
    folder = str(GOLDEN / "msmodelslim-mix")
    assert load(folder, precision="w8a8").fidelity is None  # taken as it is
    with pytest.raises(QuasarError, match=r"is quantised \(w8a8\); --precision full needs the model it was made of"):
        load(folder, precision="full")
