"""What is wrong with a checkpoint is one clear line. Spoiled at random: tests/fuzz."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quasar import QuasarError
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.cli.inspect import report
from quasar.models.config import read_config
from quasar.models.loader import build_decoder

GOLDEN = Path(__file__).parents[1] / "golden"
O_PROJ = "model.layers.0.self_attn.o_proj"


def build(folder: Path) -> None:
    build_decoder(read_config(folder), open_checkpoint(folder), ReferenceBackend())


def refusal(folder: Path) -> str:
    """The one line, which `quasar inspect` gives as well."""
    with pytest.raises(QuasarError) as caught:
        build(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert report(folder)[0][-1].endswith(f"no: {message}")
    return message


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


TENSORS: list[tuple[str, dict[str, Any], str]] = [
    ("llm-compressor", {f"{O_PROJ}.weight_scale": lambda t: t[:-1]}, "o_proj.weight_scale has shape [63, 1]"),
    ("llm-compressor", {f"{O_PROJ}.weight_scale": nan}, "o_proj.weight_scale holds scales that are not finite"),
    ("llm-compressor", {f"{O_PROJ}.weight_scale": torch.zeros_like}, "or not above zero"),
    ("llm-compressor", {f"{O_PROJ}.weight_scale": lambda t: t.to(torch.int8)}, "weight_scale is int8; bfloat16"),
    ("llm-compressor", {f"{O_PROJ}.weight_scale": None}, "o_proj.weight_scale is missing"),
    ("llm-compressor", {f"{O_PROJ}.weight": lambda t: t.float()}, "o_proj.weight is float32; the checkpoint describes"),
    ("llm-compressor", {"lm_head.weight": lambda t: t.to(torch.int8)}, "lm_head.weight is int8; the checkpoint"),
    ("llm-compressor-static", {f"{O_PROJ}.input_scale": nan}, "o_proj.input_scale holds scales that are not finite"),
    ("llm-compressor-static", {f"{O_PROJ}.input_scale": None}, "o_proj.input_scale is missing"),
    ("msmodelslim-dynamic", {f"{O_PROJ}.weight_scale": lambda t: -t}, "or not above zero"),
    ("msmodelslim-dynamic", {f"{O_PROJ}.weight_offset": torch.ones_like}, "asymmetric weights are not supported"),
    ("msmodelslim-dynamic", {"model.layers.0.self_attn.q_norm.bias": torch.ones_like}, "q_norm.bias is not zero"),
    ("msmodelslim-dynamic", {"model.layers.0.input_layernorm.bias": nan}, "input_layernorm.bias is not finite"),
    ("msmodelslim-static", {f"{O_PROJ}.deq_scale": lambda t: t * 0}, "o_proj.deq_scale holds scales"),
    (
        "msmodelslim-static-fp16",
        {f"{O_PROJ}.deq_scale": lambda t: t * 0 - 1},
        "no float32 scales above zero in its int64",
    ),
    ("msmodelslim-static", {f"{O_PROJ}.quant_bias": lambda t: t.float()}, "has quant_bias float32"),
    ("msmodelslim-static", {f"{O_PROJ}.input_offset": lambda t: t * 0 + 1000}, "input_offset 1000; int32 and a whole"),
    ("msmodelslim-static", {f"{O_PROJ}.input_offset": lambda t: t.repeat(2)}, "input_offset has shape [2]"),
    ("small-qwen3", {f"{O_PROJ}.weight": lambda t: t.to(torch.int8)}, "describes it as full precision"),
    ("small-qwen3", {f"{O_PROJ}.weight": lambda t: t[:, :-1]}, "has shape [64, 63]; config.json makes it [64, 64]"),
]


@pytest.mark.parametrize(("name", "changes", "said"), TENSORS)
def test_wrong_tensors(
    name: str, changes: dict[str, Any], said: str, golden: Callable[[str], Path], edit: Callable[..., None]
) -> None:
    folder = golden(name)
    index = next(iter(folder.glob("*.index.json")), None)
    if index is not None:  # as if it were one file: a removed tensor is then not in an index either
        index.unlink()
    edit(folder, changes)
    assert said in refusal(folder)


def scheme(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["quantization_config"]["config_groups"]["group_0"]


CONFIGS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("hidden size", lambda f: f.update(hidden_size=128), "has shape [257, 64]; config.json makes it [257, 128]"),
    ("layers", lambda f: f.update(num_hidden_layers=3), "tensor model.layers.2.input_layernorm.weight is missing"),
    (
        "fewer layers",
        lambda f: f.update(num_hidden_layers=1),
        "tensors that this architecture does not have: model.layers.1",
    ),
    ("method", lambda f: f["quantization_config"].update(quant_method="gptq"), "quant_method 'gptq' is not supported"),
    ("object", lambda f: f.update(quantization_config=[1]), "quantization_config is [1]; it should be an object"),
    ("format", lambda f: f["quantization_config"].update(format="marlin-24"), "format 'marlin-24' is not"),
    ("groups", lambda f: f["quantization_config"].update(config_groups={}), "has no config_groups"),
    ("bits", lambda f: scheme(f)["weights"].update(num_bits=4), "weights are int4; Quasar runs W8A8 (int-quantized)"),
    ("float", lambda f: scheme(f)["input_activations"].update(type="float"), "input_activations are float8"),
    ("weight only", lambda f: scheme(f).update(input_activations=None), "(W8A16)"),
    ("own format", lambda f: scheme(f).update(format="marlin-24"), "format 'marlin-24' is not supported"),
    ("packed", lambda f: scheme(f).update(format="pack-quantized"), "packed int8 weights should be symmetric"),
    ("grouped", lambda f: scheme(f)["weights"].update(strategy="group"), "by channel or tensor"),
    ("asymmetric", lambda f: scheme(f)["weights"].update(symmetric=False), "weights should be symmetric"),
    (
        "dynamic asymmetric",
        lambda f: scheme(f)["input_activations"].update(symmetric=False),
        "symmetric False, by token",
    ),
    ("output", lambda f: scheme(f).update(output_activations={}), "output_activations are not supported"),
    ("kv cache", lambda f: f["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not"),
    ("ignore", lambda f: f["quantization_config"].update(ignore=[7]), "ignore should be a list of layer names"),
    (
        "pattern",
        lambda f: f["quantization_config"].update(ignore=["re:("]),
        "pattern 're:(' is not a regular expression",
    ),
    (
        "slow pattern",
        lambda f: f["quantization_config"].update(ignore=["re:(?:a|e|o|[a-z_.0-9]|.)*[=!]"]),
        "takes too long",
    ),
    (
        "mixed",
        lambda f: f["quantization_config"].update(ignore=["lm_head", "re:.*k_proj"]),
        "k_proj.weight is int8; the checkpoint describes it as full precision",
    ),
]


@pytest.mark.parametrize(("change", "said"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_wrong_configurations(
    change: Callable[[dict[str, Any]], Any], said: str, golden: Callable[[str], Path], edit_json: Callable[..., None]
) -> None:
    folder = golden("llm-compressor")
    edit_json(folder / "config.json", change)
    assert said in refusal(folder)


def test_projections_of_one_input_in_two_precisions(
    golden: Callable[[str], Path], edit: Callable[..., None], edit_json: Callable[..., None]
) -> None:
    folder = golden("llm-compressor")
    edit_json(folder / "config.json", lambda f: f["quantization_config"].update(ignore=["lm_head", "re:.*k_proj"]))
    names = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    edit(folder, {f"{name}.weight": lambda t: t.to(torch.bfloat16) for name in names})
    edit(folder, {f"{name}.weight_scale": None for name in names})
    assert "q_proj W8A8, model.layers.0.self_attn.k_proj full precision" in refusal(folder)


def test_description_that_does_not_fit(golden: Callable[[str], Path], edit_json: Callable[..., None]) -> None:
    folder = golden("msmodelslim-dynamic")
    described = folder / "quant_model_description.json"
    edit_json(described, lambda f: f.update({f"{O_PROJ}.weight": "FLOAT"}))
    assert "o_proj.weight is int8; the checkpoint describes it as full precision" in refusal(folder)
    edit_json(described, lambda f: f.update({f"{O_PROJ}.weight": "W4A8_DYNAMIC"}))
    assert "o_proj.weight is 'W4A8_DYNAMIC'; Quasar runs FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX" in refusal(folder)
    edit_json(described, lambda f: f.pop(f"{O_PROJ}.weight"))
    assert "o_proj.weight is not described" in refusal(folder)
    shutil.copy(described, folder / "quant_model_description_w8a8.json")
    assert "holds 2 files" in refusal(folder)


def test_shards(golden: Callable[[str], Path], edit_json: Callable[..., None], tmp_path: Path) -> None:
    folder = golden("msmodelslim-dynamic")
    index, shard = next(folder.glob("*.index.json")), next(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refusal(folder)
    shard.write_bytes(b"")
    assert "not a whole safetensors file" in refusal(folder)
    shard.unlink()
    assert f"{shard.name}: no such file; the checkpoint's index names it" in refusal(folder)
    shard.write_bytes(whole)
    edit_json(index, lambda f: f["weight_map"].update({"model.layers.9.extra": shard.name}))
    assert "tensors that this architecture does not have: model.layers.9.extra" in refusal(folder)
    edit_json(index, lambda f: f["weight_map"].update({"model.norm.weight": f"../{folder.name}/{shard.name}"}))
    assert "names of files beside it" in refusal(folder)

    sharded = golden("small-qwen3")
    where = {"weight_map": {"model.norm.weight": "model.safetensors", "model.embed_tokens.weight": "model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(where))
    assert "tensor model.layers.0.input_layernorm.weight is missing" in refusal(sharded)


def test_an_index_that_names_no_possible_file(golden: Callable[[str], Path]) -> None:
    folder = golden("small-qwen3")
    where = {"weight_map": {"model.norm.weight": "x" * 5000}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(where))
    message = refusal(folder)
    assert "no such file; the checkpoint's index names it" in message
    assert len(message) < 1000


def test_an_index_that_names_an_absent_tensor(golden: Callable[[str], Path], edit: Callable[..., None]) -> None:
    folder = golden("msmodelslim-dynamic")
    edit(folder, {f"{O_PROJ}.weight_scale": None})
    assert "o_proj.weight_scale cannot be read" in refusal(folder)


def test_static_scales_that_differ_in_one_fused_layer(golden: Callable[[str], Path], edit: Callable[..., None]) -> None:
    """Symmetric: the largest, as vLLM takes it. Asymmetric: no one scale is right."""
    symmetric = golden("llm-compressor-static")
    edit(symmetric, {"model.layers.0.self_attn.q_proj.input_scale": lambda t: t * 2})
    decoder = build_decoder(read_config(symmetric), open_checkpoint(symmetric), ReferenceBackend())
    other = build_decoder(
        read_config(GOLDEN / symmetric.name), open_checkpoint(GOLDEN / symmetric.name), ReferenceBackend()
    )
    assert decoder.layers[0].qkv.static_scale == 2 * other.layers[0].qkv.static_scale
    asymmetric = golden("msmodelslim-static")
    edit(asymmetric, {"model.layers.0.self_attn.q_proj.input_scale": lambda t: t * 2})
    assert "projections of one input must quantise it the same way" in refusal(asymmetric)
