"""Layers read from checkpoints against what their formats say in floating point, written out here once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quasar.backends.base import ActivationQuant
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.weights import FullWeights, Int8Weights
from quasar.models.build import build
from quasar.models.config import read_config
from quasar.models.decoder import DecoderLayer
from quasar.models.linear import FullLinear, W8A8Linear
from quasar.models.loader import build_decoder, fuse

GOLDEN = Path(__file__).parents[1] / "golden"
O_PROJ = "model.layers.0.self_attn.o_proj"


def first_layer(folder: Path) -> DecoderLayer:
    return build_decoder(read_config(folder), open_checkpoint(folder), ReferenceBackend()).layers[0]


def tensors_of(folder: Path, name: str) -> dict[str, Tensor]:
    tensors = load_file(next(folder.glob("*.safetensors")))
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(name)}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) * 0.1


def fake_quantised(x: Tensor, scale: Tensor, offset: float) -> Tensor:
    return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale


@pytest.mark.parametrize("name", ["msmodelslim-static", "msmodelslim-static-fp16"])
def test_ascend_static(name: str, x: Tensor) -> None:
    """quant_bias takes off what the offset adds; the two cancel to the rounding of quant_bias."""
    t = tensors_of(GOLDEN / name, O_PROJ)
    offset, scale = t["input_offset"].item(), t["input_scale"].float()
    assert offset != 0
    weight = t["weight"].float() * t["weight_scale"].float()
    expected = fake_quantised(x, scale, offset) @ weight.t() + t.get("bias", torch.zeros(())).float()
    actual = first_layer(GOLDEN / name).o(x)
    assert (actual - expected).norm() < 0.01 * expected.norm()  # deq_scale was rounded to the model's type


@pytest.mark.parametrize("offset", [0, -7, 100])
def test_compressed_tensors_static(
    offset: int,
    x: Tensor,
    golden: Callable[[str], Path],
    edit: Callable[..., None],
    edit_json: Callable[..., None],
) -> None:
    folder = golden("llm-compressor-static")

    def asymmetric(fields: dict[str, Any]) -> None:
        fields["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False

    edit_json(folder / "config.json", asymmetric)
    file = folder / "model.safetensors"
    names = [key for key in load_file(file) if key.endswith("input_scale")]
    zero_points = {key.replace("scale", "zero_point"): torch.tensor([offset], dtype=torch.int8) for key in names}
    add(file, zero_points)
    t = tensors_of(folder, O_PROJ)
    weight = t["weight"].float() * t["weight_scale"].float()
    expected = fake_quantised(x, t["input_scale"].float(), offset) @ weight.t()
    torch.testing.assert_close(first_layer(folder).o(x), expected, rtol=1e-4, atol=1e-4)


def add(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def test_a_scale_for_the_whole_weight(
    x: Tensor, golden: Callable[[str], Path], edit: Callable[..., None], edit_json: Callable[..., None]
) -> None:
    folder = golden("llm-compressor")

    def per_tensor(fields: dict[str, Any]) -> None:
        fields["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"

    edit_json(folder / "config.json", per_tensor)
    names = [key for key in load_file(folder / "model.safetensors") if key.endswith("weight_scale")]
    edit(folder, dict.fromkeys(names, lambda t: t[:1, 0]))
    t = tensors_of(folder, O_PROJ)
    assert t["weight_scale"].shape == (1,)
    expected = x @ (t["weight"].float() * t["weight_scale"].float()).t()
    actual = first_layer(folder).o(x)
    assert (actual - expected).norm() < 0.02 * expected.norm()  # activations are rounded


def test_groups_and_ignored_layers(
    golden: Callable[[str], Path], edit: Callable[..., None], edit_json: Callable[..., None]
) -> None:
    """A name or pattern goes before the class; what nothing matches stays in full precision."""
    folder = golden("llm-compressor-static")

    def regroup(fields: dict[str, Any]) -> None:
        groups = fields["quantization_config"]["config_groups"]
        dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        groups["group_1"] = groups["group_0"] | {"targets": ["re:.*o_proj$"], "input_activations": dynamic}
        fields["quantization_config"]["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj"]

    edit_json(folder / "config.json", regroup)
    down = "model.layers.0.mlp.down_proj"
    o_scales = {f"model.layers.{i}.self_attn.o_proj.input_scale": None for i in range(2)}
    edit(folder, o_scales | {f"{down}.weight": lambda t: t.to(torch.bfloat16)})
    edit(folder, {f"{down}.weight_scale": None, f"{down}.input_scale": None})
    layer = first_layer(folder)
    assert layer.o.static_scale is None
    assert layer.qkv.static_scale is not None
    assert isinstance(layer.down, FullLinear)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_shifted_input(quantised: bool, x: Tensor) -> None:
    """W (x + b): folded into the bias in full precision, added before quantising in W8A8."""
    generator = torch.Generator().manual_seed(1)
    weight, own = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)
    shift = torch.randn(64, generator=generator)
    backend = ReferenceBackend()
    parts: list[Any] = [FullWeights(weight[:32], own[:32]), FullWeights(weight[32:], None)]
    if quantised:
        ones = torch.ones(48)
        weight = weight.mul(40).round().clamp(-127, 127)
        values = weight.to(torch.int8)
        parts = [Int8Weights(values[:32], ones[:32], own[:32]), Int8Weights(values[32:], ones[32:], None)]
    layer = build(fuse(["a", "b"], parts, shift), backend)
    assert isinstance(layer, W8A8Linear) == quantised
    assert layer.activation_quant is None  # the op before may not quantise what is not yet shifted
    bias = torch.cat([own[:32], torch.zeros(16)])
    expected = (x + shift) @ weight.t() + bias
    assert (layer(x) - expected).norm() < (0.02 if quantised else 1e-5) * expected.norm()


def test_static_activations_clip_at_both_ends_of_int8() -> None:
    x = torch.tensor([[-3.0, -1.27, -0.005, 0.015, 1.27, 3.0]])
    quantized = ReferenceBackend().quantize(x, ActivationQuant(torch.tensor([0.01])))
    assert quantized.values.tolist() == [[-128, -127, 0, 2, 127, 127]]
    assert quantized.scale.shape == (1,)
