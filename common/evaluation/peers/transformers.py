"""transformers' own model, eager, sdpa attention, dynamic cache."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quasar.checkpoints import open_checkpoint
from quasar.errors import QuasarError
from quasar.evaluation.speed import Step, context_ids, rows_kept
from quasar.models.config import ModelConfig
from quasar.models.loader import RandomTensors


def transformers_step(
    config: ModelConfig, folder: Path | None, context: int, device: torch.device, dtype: torch.dtype
) -> Step:
    """Passes of the model in `dtype` behind `context` tokens."""
    model = transformers_model(config, folder, dtype, device).to(device).eval()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(context_ids(config.vocab_size, context).to(device)[None], past_key_values=cache)

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> torch.Tensor:
        ids, kept = ids[None].to(device), rows_kept(len(ids))
        return model(ids, past_key_values=cache, logits_to_keep=kept).logits[0]

    return Step(run, lambda rows: cache.crop(-rows))


def transformers_model(
    config: ModelConfig, folder: Path | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The checkpoint, on the host, or `--dummy`'s random weights, made on the device, as transformers' module."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
    }
    if config.rope_scaling is not None:
        raise QuasarError("--peer: models with stretched rotary embeddings are not compared")
    # transformers has no OpenPangu; Llama with biases is the same function, and Mistral without a window is Llama.
    kind, settings = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    if config.attention_bias and not config.output_bias and not config.qk_norm:
        kind, settings = Qwen2ForCausalLM, Qwen2Config
    with torch.device("meta"):
        model = kind(settings(**shared)).to(dtype)
    if folder is not None:
        source = open_checkpoint(folder)
        if source.is_quantized:
            raise QuasarError(f"{folder} is quantised; --peer needs the full-precision model, to convert it itself")
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = {name: source.get(name, shape) for name, shape in shapes.items() if name in source}
    else:
        source = RandomTensors(config.dtype, place=lambda tensor: tensor.to(device))
        tensors = {name: source.get(name, tuple(t.shape)) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    model.tie_weights()
    rotary = model.model.rotary_emb  # not in checkpoints, so still on the meta device
    model.model.rotary_emb = type(rotary)(model.config)
    return model
