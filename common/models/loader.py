"""Hugging Face checkpoints -> Decoder: memory-mapped, one layer at a time, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from common.backends.base import AttentionSpec, Backend
from common.errors import QuasarError
from common.models.config import ModelConfig, read_json
from common.models.decoder import Decoder, DecoderLayer
from common.quantization.linear import FullLinear

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class TensorSource(Protocol):
    """Where weights come from."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The named tensor; QuasarError unless it is there and has this shape."""

    def finish(self) -> None:
        """Called when all were read; QuasarError if something is left over."""


class SafetensorsFolder:
    """One model.safetensors, or shards with an index. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
                raise QuasarError(f"{index}: weight_map should map tensor names to file names")
            files = {name: folder / file for name, file in where.items()}
        else:
            single = folder / "model.safetensors"
            if not single.exists():
                raise QuasarError(
                    f"{folder}: holds no model.safetensors and no model.safetensors.index.json; "
                    "pickled weights are never loaded, save the model with safe serialization"
                )
            files = dict.fromkeys(_names(single), single)
        self._files, self._folder, self._unused = files, folder, set(files)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise QuasarError(f"{self._folder}: tensor {name} is missing; config.json asks for it")
        file = self._files[name]
        self._unused.discard(name)
        # Opened for each tensor, so that the pages of a shard do not outlive their use.
        with _open(file) as tensors:
            try:
                tensor = tensors.get_tensor(name)
            except SafetensorError as error:
                raise QuasarError(f"{file}: tensor {name} cannot be read ({error})") from None
        if tuple(tensor.shape) != shape:
            raise QuasarError(
                f"{file}: tensor {name} has shape {list(tensor.shape)}; config.json makes it {list(shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise QuasarError(f"{file}: tensor {name} is {tensor.dtype}; bfloat16, float16 or float32 is expected")
        return tensor

    def skip(self, name: str) -> None:
        """A tensor that may be there and is not needed."""
        self._unused.discard(name)

    def finish(self) -> None:
        if self._unused:
            names = sorted(self._unused)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise QuasarError(
                f"{self._folder}: tensors that this architecture does not have: {', '.join(names[:3])}{more}"
            )


class RandomTensors:
    """Random weights of the right shapes, for timing. Values repeat every million: filling is as fast as copying."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
        self._tile = (values * 0.02).to(dtype)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._tile.dtype)
        count = torch.Size(shape).numel()
        return self._tile.repeat(-(-count // len(self._tile)))[:count].view(shape)

    def finish(self) -> None:
        return


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise QuasarError(f"{file}: no such file; the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        raise QuasarError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def _names(file: Path) -> Iterable[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def build_decoder(config: ModelConfig, source: TensorSource, backend: Backend, progress: bool = False) -> Decoder:
    """Reads every weight and puts the decoder on the backend, its linear layers still in checkpoint layout."""
    c = config

    def place(name: str, *shape: int) -> Tensor:
        return source.get(name, shape).to(backend.device)

    def norm(name: str, size: int) -> Tensor:
        return place(name, size).to(backend.dtype)

    def linear(names: list[str], sizes: list[int], inputs: int, bias: bool) -> FullLinear:
        """One projection, or several fused along their outputs."""
        weight = _fuse([place(f"{n}.weight", size, inputs) for n, size in zip(names, sizes, strict=True)])
        biases = [place(f"{n}.bias", size) for n, size in zip(names, sizes, strict=True)] if bias else None
        return FullLinear(backend, weight, None if biases is None else _fuse(biases))

    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def layer(index: int) -> DecoderLayer:
        at = f"model.layers.{index}"
        attention = AttentionSpec(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            eps=c.rms_norm_eps,
            q_norm=norm(f"{at}.self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=norm(f"{at}.self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None,
        )
        return DecoderLayer(
            index,
            attention,
            c.rms_norm_eps,
            backend,
            input_norm=norm(f"{at}.input_layernorm.weight", c.hidden_size),
            qkv=linear(
                [f"{at}.self_attn.{p}_proj" for p in "qkv"], [q_size, kv_size, kv_size], c.hidden_size, c.attention_bias
            ),
            o=linear([f"{at}.self_attn.o_proj"], [c.hidden_size], q_size, c.attention_bias),
            post_norm=norm(f"{at}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=linear(
                [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], [c.intermediate_size] * 2, c.hidden_size, False
            ),
            down=linear([f"{at}.mlp.down_proj"], [c.hidden_size], c.intermediate_size, False),
        )

    embedding = place("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    layers = [
        layer(i) for i in tqdm(range(c.num_layers), desc="loading", unit="layer", disable=not progress, leave=False)
    ]
    if c.tie_word_embeddings:
        lm_head = FullLinear(backend, embedding)
        if isinstance(source, SafetensorsFolder):
            source.skip("lm_head.weight")  # some savers write the tied weight twice
    else:
        lm_head = FullLinear(backend, place("lm_head.weight", c.vocab_size, c.hidden_size))
    final_norm = norm("model.norm.weight", c.hidden_size)
    source.finish()
    return Decoder(config, backend, embedding=embedding, layers=layers, norm=final_norm, lm_head=lm_head)


def _fuse(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
