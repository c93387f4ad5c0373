"""What a checkpoint's config.json says, reduced to the numbers one dense decoder needs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar.checkpoints.folder import read_json
from quasar.errors import QuasarError

MAX_POSITIONS = 1 << 20  # tables of cosines are made for all of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer. OpenPangu Embedded and Qwen3 are two settings of it."""

    architecture: str  # as in config.json: Qwen3ForCausalLM or PanguEmbeddedForCausalLM
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k, v and o
    qk_norm: bool  # RMSNorm of q and k per head
    dtype: torch.dtype  # of the checkpoint

    @property
    def qkv_size(self) -> int:
        """Output features of the fused q/k/v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the embedding and in all linear layers: all but the norms and biases."""
        per_layer = self.qkv_size + self.num_heads * self.head_dim + 3 * self.intermediate_size
        vocabularies = 1 if self.tie_word_embeddings else 2
        return self.hidden_size * (per_layer * self.num_layers + vocabularies * self.vocab_size)


# How the two families say the same thing: the field of config.json that puts biases on attention, and q/k norms.
_FAMILIES = {
    "Qwen3ForCausalLM": {"bias_field": "attention_bias", "qk_norm": True},
    "PanguEmbeddedForCausalLM": {"bias_field": "bias", "qk_norm": False},
}

# Members of the openPangu family that are no dense decoders of this kind, by the architecture in their config.json.
_OTHER_PANGU = {
    "PanguProMoEForCausalLM": "openPangu Pro MoE 72B (a mixture of experts)",
    "PanguProMoEV2ForCausalLM": "openPangu-R-72B-2512 (a mixture of experts)",
    "PanguUltraMoEForCausalLM": "openPangu-Ultra-MoE-718B (a mixture of experts with latent attention)",
    "OpenPanguV2ForCausalLM": "openPangu-2.0 (Flash and Pro: mixtures of experts with latent attention)",
    "OpenPanguVLForConditionalGeneration": "openPangu-VL-7B (images and text)",
}
_DENSE_PANGU = "openPangu-Embedded-1B and -7B, their V1.1, openPangu-R-7B-2512"

_SHARED_QWEN3 = {
    "architecture": "Qwen3ForCausalLM",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "qk_norm": True,
    "dtype": torch.bfloat16,
}
_SHARED_PANGU = {
    "architecture": "PanguEmbeddedForCausalLM",
    "vocab_size": 153376,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1.6e7,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "qk_norm": False,
    "dtype": torch.bfloat16,
}
DUMMY_SHAPES: dict[str, ModelConfig] = {
    "qwen3-0.6b": ModelConfig(
        **_SHARED_QWEN3,
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": ModelConfig(
        **_SHARED_QWEN3,
        hidden_size=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=12288,
        tie_word_embeddings=False,
    ),
    "openpangu-1b": ModelConfig(
        **_SHARED_PANGU,
        hidden_size=1536,
        num_layers=26,
        num_heads=12,
        num_kv_heads=6,
        intermediate_size=6144,
        tie_word_embeddings=False,
    ),
    "openpangu-7b": ModelConfig(
        **_SHARED_PANGU,
        hidden_size=4096,
        num_layers=34,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=12800,
        tie_word_embeddings=False,
    ),
}


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json. Raises QuasarError on anything this decoder would compute wrongly."""
    path = folder / "config.json"
    fields = read_json(path)
    architectures = fields.get("architectures") or [fields.get("model_type")]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    family = _FAMILIES.get(str(architecture))
    if family is None and str(architecture) in _OTHER_PANGU:
        raise QuasarError(
            f"{path}: {_OTHER_PANGU[str(architecture)]} is not supported; of openPangu Quasar runs the dense models: "
            f"{_DENSE_PANGU}"
        )
    if family is None:
        raise QuasarError(f"{path}: architecture {architecture} is not supported; Quasar runs {', '.join(_FAMILIES)}")
    _refuse_variants(path, fields)
    _warn_of_diffusion(path, fields)

    def size(name: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise QuasarError(f"{path}: {name} is {value!r}; it must be a whole number from 1 to {most}")
        return value

    def number(name: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise QuasarError(f"{path}: {name} is {value!r}; it must be a positive number")
        try:
            return float(value)
        except OverflowError:
            raise QuasarError(f"{path}: {name} has {len(str(value))} digits; it must be a positive number") from None

    rope = _rope(path, fields)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise QuasarError(f"{path}: dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    config = ModelConfig(
        architecture=str(architecture),
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        # Qwen3 states head_dim (128 in class and checkpoints alike); OpenPangu leaves it to the division.
        head_dim=size("head_dim", hidden // heads),
        intermediate_size=size("intermediate_size"),
        max_position_embeddings=size("max_position_embeddings", 32768, most=MAX_POSITIONS),
        rope_theta=number("rope_theta", fields.get("rope_theta", rope.get("rope_theta", 10000.0))),
        rms_norm_eps=number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=bool(fields.get(family["bias_field"], False)),
        qk_norm=bool(family["qk_norm"]),
        dtype=DTYPES[dtype],
    )
    if config.num_heads % config.num_kv_heads:
        raise QuasarError(
            f"{path}: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise QuasarError(f"{path}: head_dim {config.head_dim} is odd; rotary embeddings need an even one")
    return config


def _refuse_variants(path: Path, fields: dict[str, Any]) -> None:
    """Settings that change the function and that this decoder does not implement."""
    rope = _rope(path, fields, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise QuasarError(f"{path}: rope scaling {kind!r} is not supported; remove it to run at the trained length")
    if fields.get("hidden_act", "silu") != "silu":
        raise QuasarError(f"{path}: hidden_act {fields['hidden_act']!r} is not supported; Quasar runs silu")
    if fields.get("use_sliding_window"):
        raise QuasarError(f"{path}: use_sliding_window is not supported; set it to false")


def _warn_of_diffusion(path: Path, fields: dict[str, Any]) -> None:
    """openPangu-7B-Diffusion has the architecture of the dense models, and was trained to fill blocks in."""
    hints = (str(path.parent.name), str(fields.get("_name_or_path", "")), *map(str, fields))
    if str(fields.get("model_type")) == "PanguEmbedded" and any("diffusion" in hint.lower() for hint in hints):
        log.warning("%s is a diffusion model: Quasar decodes it token by token, which it was not trained for", path)


def _rope(path: Path, fields: dict[str, Any], older: str | None = None) -> dict[str, Any]:
    rope = fields.get("rope_parameters") or fields.get(older or "") or {}
    if not isinstance(rope, dict):
        raise QuasarError(f"{path}: rope_parameters is {rope!r}; it should be an object")
    return rope
