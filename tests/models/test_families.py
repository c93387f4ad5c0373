"""Llama, Mistral and Qwen2 as settings of the one decoder, and stretched rotary embeddings, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from quasar import QuasarError
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.decoder import Decoder
from quasar.models.loader import build_decoder

SIZES = {
    "vocab_size": 151,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True, head_dim=32)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "linear-rope": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0})
    ),
    "yarn-rope": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=YARN)),
    "yarn-attention-factor": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=YARN | {"attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0})
    ),
    "yarn-mscale": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False})
    ),
}


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():  # norms of 1 and biases of 0 would hide mistakes
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.3)
        elif "proj" in parameter_name:
            parameter.data *= 6  # attention that looks somewhere: positions make a difference that a test sees
    return model.eval()


def load_decoder(folder: Path) -> Decoder:
    return build_decoder(read_config(folder), open_checkpoint(folder), ReferenceBackend())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    oracle = random_model(name)
    oracle.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    ids = torch.randint(0, 151, (200,))
    logits = decoder.read(ids.tolist(), logits_to_keep=200)
    with torch.inference_mode():
        assert (logits - oracle(input_ids=ids[None]).logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama3-rope", "linear-rope", "yarn-rope"])
def test_the_older_name_of_rope_scaling(name, tmp_path):
    """Checkpoints from before transformers 5 have rope_theta beside rope_scaling, whose type some call `type`."""
    random_model(name).save_pretrained(tmp_path)
    present = read_config(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    kind = rope.pop("rope_type")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": kind}}
    path.write_text(json.dumps(fields))
    assert read_config(tmp_path) == present


def test_yarn_runs_at_the_stretched_length(tmp_path):
    """Qwen's model cards have one add the scaling and leave max_position_embeddings as it was."""
    random_model("yarn-rope").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    assert read_config(tmp_path).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window 128 is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names other layers"),
        ("llama", {"mlp_bias": True}, "mlp_bias is not supported"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 0.5}}, "rope scaling's factor is 0.5; it must be 1 or more"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, "rope scaling's factor is None"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor 4 must be above"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": "x"}}, "beta_fast is 'x'; it must be a positive number"),
        ("llama", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": ["x" * 5000]}}, "is not supported"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it should be an object"),
    ],
)
def test_settings_that_do_not_run(name, fields, message, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(QuasarError, match=message) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    random_model("mistral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 256}))
    assert read_config(tmp_path).num_kv_heads == 2
