"""Plain weights -> a decoder that runs on a backend, a layer at a time: no second copy of the model is ever made."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import AttentionSpec, Backend
from quasar.checkpoints.weights import FullWeights, HeadWeights, Int8Weights, LayerWeights, LinearWeights
from quasar.models.config import ModelConfig
from quasar.models.decoder import Decoder, DecoderLayer
from quasar.models.linear import FullLinear, Linear, W8A8Linear
from quasar.models.linear_int4 import W4A16Linear


class WeightSource(Protocol):
    """A model's weights, each part read when it is asked for: a checkpoint, or ModelWeights in memory."""

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""

    def layer(self, index: int) -> LayerWeights:
        """The decoder layer `index`."""

    def head(self, embedding: Tensor) -> HeadWeights:
        """The last norm and lm_head; embedding is what `embedding()` gave."""


def build(weights: LinearWeights, backend: Backend) -> Linear:
    """The runnable layer of these weights. int4 weights run under 16-bit activations."""
    if isinstance(weights, FullWeights):
        return FullLinear(backend, weights)
    if isinstance(weights, Int8Weights):
        return W8A8Linear(backend, weights)
    return W4A16Linear.of(backend, weights)


def build_layer(config: ModelConfig, weights: LayerWeights, backend: Backend) -> DecoderLayer:
    """The runnable decoder layer of these weights."""

    def norm(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else backend.place(tensor).to(backend.dtype)

    attention = AttentionSpec(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        q_norm=norm(weights.q_norm),
        k_norm=norm(weights.k_norm),
        eps=config.rms_norm_eps,
    )
    return DecoderLayer(
        weights.index,
        attention,
        config.rms_norm_eps,
        backend,
        input_norm=norm(weights.input_norm),
        qkv=build(weights.qkv, backend),
        o=build(weights.o, backend),
        post_norm=norm(weights.post_norm),
        gate_up=build(weights.gate_up, backend),
        down=build(weights.down, backend),
    )


def assemble(config: ModelConfig, source: WeightSource, backend: Backend, progress: bool = False) -> Decoder:
    """The decoder of these weights; each layer's are let go once the device has them in its own layout."""
    embedding = backend.place(source.embedding())
    indices = tqdm(range(config.num_layers), desc="loading", unit="layer", disable=not progress, leave=False)
    layers = [build_layer(config, source.layer(i), backend) for i in indices]
    head = source.head(embedding)
    norm, lm_head = backend.place(head.norm).to(backend.dtype), build(head.lm_head, backend)
    return Decoder(config, backend, embedding=embedding, layers=layers, norm=norm, lm_head=lm_head)


def precision_of(decoder: Decoder) -> str:
    """full, w8a8 or w4a16: the lowest that any of its linear layers has."""
    linears = decoder.linears()
    if any(isinstance(linear, W4A16Linear) for linear in linears):
        return "w4a16"
    return "w8a8" if any(isinstance(linear, W8A8Linear) for linear in linears) else "full"
