"""What a checkpoint's config.json says, reduced to the numbers one dense decoder needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quasar.checkpoints.folder import read_json
from quasar.checkpoints.gguf import gguf_config, open_gguf, rope_factors
from quasar.errors import QuasarError, shorten
from quasar.models.rope import RopeScaling, positive_number, repr_of, rope_fields, rope_scaling

MAX_POSITIONS = 1 << 20  # tables of cosines are made for all of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer. OpenPangu Embedded, Qwen3, Qwen2, Llama and Mistral are settings of it."""

    architecture: str  # as in config.json, one of ARCHITECTURES
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
    attention_bias: bool  # on q, k and v
    qk_norm: bool  # RMSNorm of q and k per head
    dtype: torch.dtype  # of the checkpoint
    output_bias: bool = False  # on o
    rope_scaling: RopeScaling | None = None

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


@dataclass(frozen=True)
class _Family:
    """How an architecture says what others say too: biases, q/k norms, and what config.json may leave out."""

    bias_field: str | None  # of config.json, that puts biases on q, k, v and o; None: q, k and v have `bias`, o none
    bias: bool = False  # where bias_field is None or absent
    qk_norm: bool = False
    max_position_embeddings: int = 32768
    sliding_window: int | None = None


_FAMILIES = {
    "Qwen3ForCausalLM": _Family("attention_bias", qk_norm=True),
    "Qwen2ForCausalLM": _Family(None, bias=True),
    "PanguEmbeddedForCausalLM": _Family("bias"),
    "LlamaForCausalLM": _Family("attention_bias", max_position_embeddings=2048),
    # A Mistral checkpoint that does not name its window has the first release's.
    "MistralForCausalLM": _Family(None, max_position_embeddings=131072, sliding_window=4096),
}
ARCHITECTURES = tuple(_FAMILIES)

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
    "output_bias": True,
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
    """Reads `folder`/config.json, or the metadata of a GGUF file. Raises QuasarError on anything this decoder would
    compute wrongly."""
    if folder.is_file():
        file = open_gguf(folder)
        config = config_of(gguf_config(file), folder)
        factors = rope_factors(file, config.head_dim)
        return replace(config, rope_scaling=RopeScaling("factors", factors=factors)) if factors else config
    path = folder / "config.json"
    return config_of(read_json(path), path)


def config_of(fields: dict[str, Any], path: Path) -> ModelConfig:
    """The configuration that config.json's fields describe; path is named where they are wrong."""
    architectures = fields.get("architectures") or [fields.get("model_type")]
    architecture = str(architectures[0] if isinstance(architectures, list) else architectures)
    family = _FAMILIES.get(architecture)
    if architecture in _OTHER_PANGU:
        raise QuasarError(
            f"{path}: {_OTHER_PANGU[architecture]} is not supported; of openPangu Quasar runs the dense models: "
            f"{_DENSE_PANGU}"
        )
    if family is None:
        known = ", ".join(_FAMILIES)
        raise QuasarError(f"{path}: architecture {shorten(architecture)} is not supported; Quasar runs {known}")
    numbers = _Numbers(path, fields)
    size, number = numbers.size, numbers.number
    _warn_of_diffusion(path, fields)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise QuasarError(f"{path}: dtype {shorten(dtype)} is not supported; use one of {', '.join(DTYPES)}")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    positions = size("max_position_embeddings", family.max_position_embeddings, most=MAX_POSITIONS)
    _refuse_variants(path, fields, family, positions)
    rope = rope_fields(path, fields)
    scaling = rope_scaling(path, rope, positions)
    bias = family.bias if family.bias_field is None else numbers.flag(family.bias_field, family.bias)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        # Qwen3 states head_dim (128 in class and checkpoints alike); others leave it to the division.
        head_dim=size("head_dim", max(1, hidden // heads)),
        intermediate_size=size("intermediate_size"),
        max_position_embeddings=positions if scaling is None else min(MAX_POSITIONS, scaling.positions(positions)),
        rope_theta=number("rope_theta", fields.get("rope_theta", rope.get("rope_theta", 10000.0))),
        rms_norm_eps=number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=numbers.flag("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias and family.bias_field is not None,
        qk_norm=family.qk_norm,
        dtype=DTYPES[dtype],
        rope_scaling=scaling,
    )
    if config.num_heads % config.num_kv_heads:
        raise QuasarError(
            f"{path}: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise QuasarError(f"{path}: head_dim {config.head_dim} is odd; rotary embeddings need an even one")
    return config


class _Numbers:
    """Numbers and switches in the fields of config.json."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path, self.fields = path, fields

    def size(self, name: str, default: int | None = None, most: int = 1 << 31) -> int:
        """A whole number from 1; the default where it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise QuasarError(
                f"{self.path}: {name} is {shorten(repr_of(value))}; it must be a whole number from 1 to {most}"
            )
        return value

    def number(self, name: str, value: Any) -> float:
        """A finite number above zero."""
        return positive_number(self.path, name, value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; the default where it is absent or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise QuasarError(f"{self.path}: {name} is {shorten(repr_of(value))}; it must be true or false")
        return default if value is None else value


def _refuse_variants(path: Path, fields: dict[str, Any], family: _Family, positions: int) -> None:
    """Settings that change the function and that this decoder does not implement."""
    if fields.get("hidden_act", "silu") != "silu":
        raise QuasarError(f"{path}: hidden_act {shorten(repr_of(fields['hidden_act']))} is not supported; use silu")
    if fields.get("use_sliding_window"):
        raise QuasarError(f"{path}: use_sliding_window is not supported; set it to false")
    if fields.get("mlp_bias"):
        raise QuasarError(f"{path}: mlp_bias is not supported; Quasar runs gate, up and down projections without")
    if family.sliding_window is not None:
        window = fields.get("sliding_window", family.sliding_window)
        if window is not None and not (isinstance(window, int) and window >= positions):
            raise QuasarError(
                f"{path}: sliding_window {shorten(repr_of(window))} is not supported; Quasar attends to every "
                "position (null says that the model does)"
            )
    layers = fields.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        raise QuasarError(f"{path}: layer_types names other layers than full_attention, which Quasar does not run")
    partial = fields.get("partial_rotary_factor") or rope_fields(path, fields).get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise QuasarError(f"{path}: partial_rotary_factor {shorten(repr_of(partial))} is not supported; it must be 1")


def _warn_of_diffusion(path: Path, fields: dict[str, Any]) -> None:
    """openPangu-7B-Diffusion has the architecture of the dense models, and was trained to fill blocks in."""
    hints = (str(path.parent.name), str(fields.get("_name_or_path", "")), *map(str, fields))
    if str(fields.get("model_type")) == "PanguEmbedded" and any("diffusion" in hint.lower() for hint in hints):
        log.warning("%s is a diffusion model: Quasar decodes it token by token, which it was not trained for", path)
