"""Checkpoints -> Decoder: one layer at a time, in the precision the checkpoint has, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import AttentionSpec, Backend
from quasar.checkpoints.weights import FullWeights, LinearWeights
from quasar.errors import QuasarError
from quasar.models.config import ModelConfig
from quasar.models.decoder import Decoder, DecoderLayer
from quasar.models.linear import Linear, fused_linear


class TensorSource(Protocol):
    """Where weights come from: SafetensorsFolder and its like, one for each format, or RandomTensors."""

    def get(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The named tensor; QuasarError unless it is there and has one of these shapes."""

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        """The projection `name`, in the precision it is stored in."""

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        """What smoothing added to the output of the norm `name`, float32 [size]."""

    def skip(self, *names: str) -> None:
        """Tensors that may be there and are not needed."""

    def finish(self) -> None:
        """Called when all were read; QuasarError if something is left over."""


class RandomTensors:
    """Random weights of the right shapes, for timing. Values repeat every million: filling is as fast as copying.

    place: a backend's own, so that a device fills its memory itself instead of waiting for gigabytes from the host.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0, place: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
        self._tile = place((values * 0.02).to(dtype))

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._tile.dtype, device=self._tile.device)
        count = torch.Size(shape).numel()
        return self._tile.repeat(-(-count // len(self._tile)))[:count].view(shape)

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        return FullWeights(
            self.get(f"{name}.weight", (out, inputs)), self.get(f"{name}.bias", (out,)) if bias else None
        )

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        return None

    def skip(self, *names: str) -> None:
        return

    def finish(self) -> None:
        return


class DecoderParts:
    """Builds the parts of a decoder on a backend, each when it is asked for; linear layers stay unpacked."""

    def __init__(self, config: ModelConfig, source: TensorSource, backend: Backend) -> None:
        self.config, self.source, self.backend = config, source, backend
        c = config
        self._q_size, self._kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def embedding(self) -> Tensor:
        """[vocab, hidden], in the checkpoint's own type."""
        c = self.config
        return self.backend.place(self.source.get("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)))

    def layer(self, index: int) -> DecoderLayer:
        """The decoder layer `index`."""
        c, at = self.config, f"model.layers.{index}"
        attention = AttentionSpec(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            eps=c.rms_norm_eps,
            q_norm=self._norm(f"{at}.self_attn.q_norm", c.head_dim)[0] if c.qk_norm else None,
            k_norm=self._norm(f"{at}.self_attn.k_norm", c.head_dim)[0] if c.qk_norm else None,
        )
        input_norm, input_bias = self._norm(f"{at}.input_layernorm", c.hidden_size, may_shift=True)
        post_norm, post_bias = self._norm(f"{at}.post_attention_layernorm", c.hidden_size, may_shift=True)
        names = {fused: [f"{at}.{part}" for part in parts] for fused, parts in PROJECTIONS.items()}
        return DecoderLayer(
            index,
            attention,
            c.rms_norm_eps,
            self.backend,
            input_norm=input_norm,
            qkv=self._linear(names["qkv"], self.sizes["qkv"], c.hidden_size, c.attention_bias, input_bias),
            o=self._linear(names["o"], self.sizes["o"], self._q_size, c.attention_bias),
            post_norm=post_norm,
            gate_up=self._linear(names["gate_up"], self.sizes["gate_up"], c.hidden_size, False, post_bias),
            down=self._linear(names["down"], self.sizes["down"], c.intermediate_size, False),
        )

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Output features of the projections that each linear layer of a decoder layer is fused from."""
        c = self.config
        return {
            "qkv": [self._q_size, self._kv_size, self._kv_size],
            "o": [c.hidden_size],
            "gate_up": [c.intermediate_size] * 2,
            "down": [c.hidden_size],
        }

    def head(self, embedding: Tensor) -> tuple[Tensor, Linear]:
        """The last norm [hidden], and lm_head: the embedding again where they are tied."""
        c = self.config
        norm, bias = self._norm("model.norm", c.hidden_size, may_shift=True)
        if not c.tie_word_embeddings:
            return norm, self._linear(["lm_head"], [c.vocab_size], c.hidden_size, False, bias)
        self.source.skip("lm_head.weight")  # some savers write the tied weight twice
        return norm, fused_linear(self.backend, ["lm_head"], [FullWeights(embedding, None)], bias)

    def _norm(self, name: str, size: int, may_shift: bool = False) -> tuple[Tensor, Tensor | None]:
        bias = self.source.norm_bias(name, size)
        if bias is not None and not may_shift:
            raise QuasarError(f"{name}.bias is not zero; Quasar runs shifted inputs of linear layers only")
        return self.backend.place(self.source.get(f"{name}.weight", (size,))).to(self.backend.dtype), bias

    def _linear(
        self, names: list[str], sizes: list[int], inputs: int, bias: bool, input_bias: Tensor | None = None
    ) -> Linear:
        """One projection, or several fused along their outputs."""
        parts = [self.source.linear(name, size, inputs, bias) for name, size in zip(names, sizes, strict=True)]
        return fused_linear(self.backend, names, parts, input_bias)


# The projections of a decoder layer by the linear layer they are fused into.
PROJECTIONS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def build_decoder(config: ModelConfig, source: TensorSource, backend: Backend, progress: bool = False) -> Decoder:
    """Reads every weight and puts the decoder on the backend; full-precision layers stay in checkpoint layout."""
    parts = DecoderParts(config, source, backend)
    embedding = parts.embedding()
    indices = tqdm(range(config.num_layers), desc="loading", unit="layer", disable=not progress, leave=False)
    layers = [parts.layer(i) for i in indices]
    norm, lm_head = parts.head(embedding)
    source.finish()
    return Decoder(config, backend, embedding=embedding, layers=layers, norm=norm, lm_head=lm_head)
