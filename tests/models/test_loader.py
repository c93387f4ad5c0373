"""Checkpoints as they come, and as they come broken: each fault is one line that names it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quasar import QuasarError, load
from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import DUMMY_SHAPES, read_config
from quasar.models.loader import RandomTensors, build_decoder
from quasar.models.model import find_checkpoint
from tests.conftest import FAMILIES, random_transformer, save_checkpoint


def decoder_of(folder):
    return build_decoder(read_config(folder), open_checkpoint(folder), get_backend("reference"))


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    return save_checkpoint(random_transformer(request.param), tmp_path)


def logits(decoder):
    return decoder.read(torch.arange(12), logits_to_keep=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sharded_equals_single(dtype, tmp_path):
    model = random_transformer("qwen3", dtype)
    single = save_checkpoint(model, tmp_path / "single")
    sharded = save_checkpoint(model, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert read_config(single).dtype == dtype
    torch.testing.assert_close(logits(decoder_of(single)), logits(decoder_of(sharded)))


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"dtype": "float8"}, "dtype float8 is not supported"),
        ({"intermediate_size": 128}, "has shape .* config.json makes it"),
        ({"num_hidden_layers": 4}, r"tensor model.layers.3.* is missing"),
        ({"num_hidden_layers": 2}, r"tensors that this architecture does not have: model.layers.2"),
    ],
)
def test_configs_that_do_not_fit(checkpoint, fields, message):
    change_config(checkpoint, **fields)
    with pytest.raises(QuasarError, match=message):
        decoder_of(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_config_that_is_not_json(checkpoint, text):
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(QuasarError, match=r"config\.json: (cannot be read as JSON|holds no JSON object)"):
        read_config(checkpoint)


@pytest.mark.parametrize("size", [0, 7, 100, 20_000])
def test_truncated_weights(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(QuasarError, match="not a whole safetensors file"):
        decoder_of(checkpoint)


def test_missing_shard(tmp_path):
    folder = save_checkpoint(random_transformer("qwen3"), tmp_path, max_shard_size="100KB")
    next(iter(folder.glob("*-of-*.safetensors"))).unlink()
    with pytest.raises(QuasarError, match="no such file; the checkpoint's index names it"):
        decoder_of(folder)


def test_weights_that_are_not_floats(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(QuasarError, match=r"model.norm.weight is int32"):
        decoder_of(checkpoint)


def test_pickles_are_never_loaded(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(QuasarError, match="pickled weights are never loaded"):
        decoder_of(checkpoint)


def test_names_that_lead_nowhere(monkeypatch):
    with pytest.raises(QuasarError, match="no such folder; shipped models are tiny-openpangu, tiny-qwen3"):
        find_checkpoint("no-such-model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(QuasarError, match=r"not to be had from the hub \(offline\)"):
        find_checkpoint("some/model")


def test_hub_download_leaves_code_behind(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or tmp_path
    )
    assert find_checkpoint("some/model") == tmp_path
    find_checkpoint("some/model", trust_remote_code=True)
    assert "*.py" not in asked[0]
    assert "*.py" in asked[1]


def test_tokenizer_code_runs_only_when_trusted(tmp_path):
    """A checkpoint whose tokenizer is Python code in it, as openPangu's is."""
    folder = save_checkpoint(random_transformer("openpangu"), tmp_path)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
        )
    )
    (folder / "tokenization_own.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    with pytest.raises(QuasarError, match="--trust-remote-code"):
        load(str(folder), device="reference")
    assert not (folder / "ran").exists()


def test_dummy_shapes_have_their_names_sizes():
    """Parameter counts of the published models, from the shapes alone."""
    billions = {"qwen3-0.6b": 0.596, "qwen3-8b": 8.19, "openpangu-1b": 1.39, "openpangu-7b": 8.0}
    for name, c in DUMMY_SHAPES.items():
        assert c.matrix_parameters / 1e9 == pytest.approx(billions[name], rel=0.01), name


def test_random_tensors_make_a_decoder():
    config = read_config(find_checkpoint("tiny-openpangu"))
    decoder = build_decoder(config, RandomTensors(torch.bfloat16), get_backend("reference"))
    assert logits(decoder).isfinite().all()
    assert decoder.layers[0].qkv.bias.abs().max() > 0


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("PanguProMoEForCausalLM", "openPangu Pro MoE 72B"),
        ("PanguProMoEV2ForCausalLM", "openPangu-R-72B-2512"),
        ("PanguUltraMoEForCausalLM", "openPangu-Ultra-MoE-718B"),
        ("OpenPanguV2ForCausalLM", r"openPangu-2\.0 \(Flash and Pro"),
        ("OpenPanguVLForConditionalGeneration", "openPangu-VL-7B"),
    ],
)
def test_members_of_the_family_that_do_not_run_are_refused_by_name(checkpoint, architecture, name):
    change_config(checkpoint, architectures=[architecture])
    with pytest.raises(QuasarError, match=f"{name}.* is not supported; of openPangu Quasar runs the dense models"):
        read_config(checkpoint)


def test_a_diffusion_model_is_warned_of(tmp_path, caplog):
    folder = save_checkpoint(random_transformer("openpangu"), tmp_path / "openPangu-7B-Diffusion-Base")
    change_config(folder, model_type="PanguEmbedded")
    read_config(folder)
    assert "is a diffusion model: Quasar decodes it token by token" in caplog.text
