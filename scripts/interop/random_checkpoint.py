"""Writes a random checkpoint of a real shape, for measuring what quantising it takes.

    python random_checkpoint.py SHAPE OUT [TOKENIZER_FOLDER]

SHAPE is one of `quasar generate --dummy`'s. The tokenizer's ids have to fit its vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from quasar.models.config import DUMMY_SHAPES
from quasar.models.loader import PROJECTIONS, DecoderParts, RandomTensors
from quasar.models.model import ASSETS


def main() -> None:
    shape, out = sys.argv[1], Path(sys.argv[2])
    tokenizer = Path(sys.argv[3]) if len(sys.argv) > 3 else ASSETS / "tiny-qwen3"
    c = DUMMY_SHAPES[shape]
    source = RandomTensors(c.dtype)
    out.mkdir()
    where: dict[str, str] = {}

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    table = (c.vocab_size, c.hidden_size)
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": (c.hidden_size,)}
    if not c.tie_word_embeddings:
        ends["lm_head.weight"] = table
    write(0, {name: source.get(name, shape) for name, shape in ends.items()})
    parts = DecoderParts(c, source, backend=None)
    inputs = {
        "qkv": c.hidden_size,
        "o": c.num_heads * c.head_dim,
        "gate_up": c.hidden_size,
        "down": c.intermediate_size,
    }
    for i in range(c.num_layers):
        norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
        if c.qk_norm:
            norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in norms.items()}
        for fused, names in PROJECTIONS.items():
            for name, size in zip(names, parts.sizes[fused], strict=True):
                shapes[f"{name}.weight"] = (size, inputs[fused])
                if c.attention_bias and "self_attn" in name:
                    shapes[f"{name}.bias"] = (size,)
        write(i + 1, {f"model.layers.{i}.{n}": source.get(n, shape) for n, shape in shapes.items()})
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    fields = {
        "architectures": [c.architecture],
        "model_type": "qwen3" if c.qk_norm else "PanguEmbedded",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.attention_bias,
        "bias": c.attention_bias,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer / name, out)


if __name__ == "__main__":
    main()
