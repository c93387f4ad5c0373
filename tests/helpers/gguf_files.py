"""Small GGUF files of random weights, written by the gguf package as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

SIZES = {"layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 512, "vocab": 300}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "pangu-embedded")


def byte_alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes, by byte."""
    from tokenizers import pre_tokenizers

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    alphabet = [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def random_blocks(rng: np.random.Generator, rows: int, columns: int, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes uint8 [rows, bytes] of a block type, with scales that make values of about 0.05."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    scale = rng.uniform(1e-5, 1e-4, (rows, columns // block, 2)).astype(np.float16).view(np.uint8)
    if kind == GGMLQuantizationType.Q6_K:  # the scale stands last
        data[..., -2:] = scale[..., :2]
    else:  # d and, for Q4_K, dmin stand first
        data[..., :4] = scale
    return data.reshape(rows, -1)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kind: str = "F32",
    *,
    tied: bool = False,
    tokenizer: bool = True,
    metadata: dict[str, Any] | None = None,
    rope_factors: np.ndarray | None = None,
    seed: int = 0,
    **sizes: int,
) -> Path:
    """Writes a model whose matrices have the type `kind`; metadata replaces or adds single integers and texts."""
    s = SIZES | sizes
    rng = np.random.default_rng(seed)
    quant = GGMLQuantizationType[kind]
    writer = GGUFWriter(path, architecture)
    numbers = {
        "context_length": 128,
        "embedding_length": s["hidden"],
        "block_count": s["layers"],
        "feed_forward_length": s["intermediate"],
        "attention.head_count": s["heads"],
        "attention.head_count_kv": s["kv_heads"],
        "rope.dimension_count": s["head_dim"],
    }
    if architecture in ("qwen3", "pangu-embedded"):
        numbers |= {"attention.key_length": s["head_dim"], "attention.value_length": s["head_dim"]}
    for name, value in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_string("general.name", "small")
    for name, value in (metadata or {}).items():
        {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}[type(value)](name, value)
    if tokenizer:
        _add_tokenizer(writer, s["vocab"])

    def matrix(name: str, rows: int, columns: int) -> None:
        if kind in ("Q4_K", "Q6_K"):
            writer.add_tensor(name, random_blocks(rng, rows, columns, quant), raw_dtype=quant)
            return
        values = rng.normal(0, 0.05, (rows, columns)).astype(np.float32)
        plain = kind in ("F32", "F16")
        data = quantize(values, quant)
        writer.add_tensor(name, data, raw_dtype=None if plain else quant)

    def vector(name: str, size: int, mean: float) -> None:
        writer.add_tensor(name, rng.normal(mean, 0.2, size).astype(np.float32))

    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    matrix("token_embd.weight", s["vocab"], s["hidden"])
    for i in range(s["layers"]):
        vector(f"blk.{i}.attn_norm.weight", s["hidden"], 1)
        vector(f"blk.{i}.ffn_norm.weight", s["hidden"], 1)
        for part, out, inputs in (("q", q, s["hidden"]), ("k", kv, s["hidden"]), ("v", kv, s["hidden"])):
            matrix(f"blk.{i}.attn_{part}.weight", out, inputs)
            if architecture in ("qwen2", "pangu-embedded"):
                vector(f"blk.{i}.attn_{part}.bias", out, 0)
        matrix(f"blk.{i}.attn_output.weight", s["hidden"], q)
        if architecture == "pangu-embedded":
            vector(f"blk.{i}.attn_output.bias", s["hidden"], 0)
        if architecture == "qwen3":
            vector(f"blk.{i}.attn_q_norm.weight", s["head_dim"], 1)
            vector(f"blk.{i}.attn_k_norm.weight", s["head_dim"], 1)
        matrix(f"blk.{i}.ffn_gate.weight", s["intermediate"], s["hidden"])
        matrix(f"blk.{i}.ffn_up.weight", s["intermediate"], s["hidden"])
        matrix(f"blk.{i}.ffn_down.weight", s["hidden"], s["intermediate"])
    vector("output_norm.weight", s["hidden"], 1)
    if not tied:
        matrix("output.weight", s["vocab"], s["hidden"])
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    """Byte-level BPE: 256 bytes, some merges, three control tokens, and unused ones up to `vocab`."""
    alphabet = byte_alphabet()
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n"), ("1", "2")]
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = [1] * (len(tokens) - 3) + [3] * 3
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    kinds += [5] * (vocab - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
