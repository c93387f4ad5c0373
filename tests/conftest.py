"""Small random checkpoints saved by transformers itself, and the shipped models, each made or loaded once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # tests/gpu run in Triton's interpreter then. It is chosen when triton is imported, which transformers may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from quasar import Model, load
from tests.helpers import unmeasured

# What tests quantise goes into a cache of their own, and with it.
_cache = tempfile.TemporaryDirectory(prefix="quasar-tests-")
os.environ["QUASAR_CACHE"] = _cache.name

# Tiny models gain nothing from threads, and on a busy machine their barriers cost seconds.
torch.set_num_threads(1)

unmeasured.fix()
settings.register_profile("quasar", deadline=None)  # a busy machine is no failure
settings.load_profile("quasar")

FAMILIES = ("qwen3", "openpangu")
TINY = {"qwen3": "tiny-qwen3", "openpangu": "tiny-openpangu"}
# Sizes that no kernel likes: odd vocabulary, few heads, head_dim * heads != hidden for Qwen3.
_SIZES = {
    "vocab_size": 151,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
}


def random_transformer(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A small random model of transformers' own: the oracle. OpenPangu is Llama with biases on q, k, v and o."""
    torch.manual_seed(seed)
    if family == "qwen3":
        sizes = _SIZES | {"num_attention_heads": 6, "head_dim": 16} | sizes
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **sizes))
    else:
        sizes = _SIZES | {"num_attention_heads": 4} | sizes
        config = LlamaConfig(attention_bias=True, tie_word_embeddings=False, rope_theta=1.6e7, **sizes)
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # initial norms of 1 and biases of 0 would hide mistakes
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.to(dtype).eval()


def save_checkpoint(model: PreTrainedModel, folder: Path, **options: str) -> Path:
    """Saves it as the family's own checkpoints look."""
    model.save_pretrained(folder, **options)
    if isinstance(model, LlamaForCausalLM):
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        fields |= {
            "architectures": ["PanguEmbeddedForCausalLM"],
            "model_type": "PanguEmbedded",
            "bias": fields.pop("attention_bias"),
        }
        path.write_text(json.dumps(fields))
    return folder


@cache
def _shipped(family: str, precision: str, device: str, kv: str) -> Model:
    return load(TINY[family], device=device, precision=precision, kv=kv)


@pytest.fixture(scope="session")
def shipped() -> Callable[..., Model]:
    """shipped(family, precision="full", device="cpu", kv="auto"): a shipped model, loaded once. Do not change it."""
    return lambda family, precision="full", device="cpu", kv="auto": _shipped(family, precision, device, kv)
