"""Checkpoints -> weights: one layer at a time, in the precision the checkpoint has, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quasar.backends.base import Backend
from quasar.checkpoints.weights import (
    FullWeights,
    HeadWeights,
    Int4Weights,
    Int8Weights,
    LayerWeights,
    LinearWeights,
)
from quasar.errors import QuasarError
from quasar.models.build import assemble
from quasar.models.config import ModelConfig
from quasar.models.decoder import Decoder


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


class CheckpointWeights:
    """A checkpoint's weights, projections of one input fused; each part is read when it is asked for, every time anew.

    place: a backend's own, so that what is fused is fused where it ends up: the checkpoint's pages are read once and
    not copied on the host.
    """

    def __init__(self, config: ModelConfig, source: TensorSource, place: Callable[[Tensor], Tensor]) -> None:
        self.config = config
        self.source = source
        self.place = place

    def embedding(self) -> Tensor:
        """[vocab, hidden], in the checkpoint's own type."""
        c = self.config
        return self.place(self.source.get("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)))

    def layer(self, index: int) -> LayerWeights:
        """The decoder layer `index`. Raises QuasarError for what no layer can be made of."""
        c, at = self.config, f"model.layers.{index}"
        input_norm, input_bias = self._norm(f"{at}.input_layernorm", c.hidden_size, may_shift=True)
        post_norm, post_bias = self._norm(f"{at}.post_attention_layernorm", c.hidden_size, may_shift=True)
        names = {fused: [f"{at}.{part}" for part in parts] for fused, parts in PROJECTIONS.items()}
        sizes, heads = output_sizes(c), c.num_heads * c.head_dim
        return LayerWeights(
            index,
            input_norm,
            q_norm=self._norm(f"{at}.self_attn.q_norm", c.head_dim)[0] if c.qk_norm else None,
            k_norm=self._norm(f"{at}.self_attn.k_norm", c.head_dim)[0] if c.qk_norm else None,
            qkv=self._linear(names["qkv"], sizes["qkv"], c.hidden_size, c.attention_bias, input_bias),
            o=self._linear(names["o"], sizes["o"], heads, c.output_bias),
            post_norm=post_norm,
            gate_up=self._linear(names["gate_up"], sizes["gate_up"], c.hidden_size, False, post_bias),
            down=self._linear(names["down"], sizes["down"], c.intermediate_size, False),
        )

    def head(self, embedding: Tensor) -> HeadWeights:
        """The last norm [hidden], and lm_head: the embedding again where they are tied."""
        c = self.config
        norm, bias = self._norm("model.norm", c.hidden_size, may_shift=True)
        if not c.tie_word_embeddings:
            return HeadWeights(norm, self._linear(["lm_head"], [c.vocab_size], c.hidden_size, False, bias))
        self.source.skip("lm_head.weight")  # some savers write the tied weight twice
        return HeadWeights(norm, fuse(["lm_head"], [FullWeights(embedding, None)], bias, self.place))

    def finish(self) -> None:
        """Called when all were read; QuasarError if the checkpoint holds something else."""
        self.source.finish()

    def _norm(self, name: str, size: int, may_shift: bool = False) -> tuple[Tensor, Tensor | None]:
        bias = self.source.norm_bias(name, size)
        if bias is not None and not may_shift:
            raise QuasarError(f"{name}.bias is not zero; Quasar runs shifted inputs of linear layers only")
        return self.source.get(f"{name}.weight", (size,)), bias

    def _linear(
        self, names: list[str], sizes: list[int], inputs: int, bias: bool, input_bias: Tensor | None = None
    ) -> LinearWeights:
        """One projection, or several fused along their outputs."""
        parts = [self.source.linear(name, size, inputs, bias) for name, size in zip(names, sizes, strict=True)]
        return fuse(names, parts, input_bias, self.place)


def output_sizes(c: ModelConfig) -> dict[str, list[int]]:
    """Output features of the projections that each linear layer of a decoder layer is fused from."""
    kv_size = c.num_kv_heads * c.head_dim
    return {
        "qkv": [c.num_heads * c.head_dim, kv_size, kv_size],
        "o": [c.hidden_size],
        "gate_up": [c.intermediate_size] * 2,
        "down": [c.hidden_size],
    }


# The projections of a decoder layer by the linear layer they are fused into.
PROJECTIONS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def fuse(
    names: Sequence[str],
    parts: Sequence[LinearWeights],
    input_bias: Tensor | None = None,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> LinearWeights:
    """One linear layer of projections `names` of the same input, fused along their outputs.

    input_bias [in] is added to that input. Raises QuasarError where the parts do not have one precision: one product
    cannot compute them, and vLLM and vLLM-Ascend refuse such checkpoints too.
    """
    if len({_precision(part) for part in parts}) > 1:
        kinds = ", ".join(f"{name} {_precision(part)}" for name, part in zip(names, parts, strict=True))
        raise QuasarError(f"{kinds}: projections of one input must have the same precision")

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        moved = [place(tensor) for tensor in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    bias = None
    if any(part.bias is not None for part in parts):
        bias = joined([torch.zeros(_rows(part)) if part.bias is None else part.bias for part in parts])
    if isinstance(parts[0], FullWeights):
        weight = joined([part.weight for part in parts])
        if input_bias is not None:  # W (x + b) = W x + W b
            moved = weight.float() @ input_bias.to(weight.device, torch.float32)
            bias = moved if bias is None else bias.float() + moved
        return FullWeights(weight, bias)
    values, scale = joined([part.values for part in parts]), joined([part.scale for part in parts])
    if isinstance(parts[0], Int4Weights):
        if input_bias is not None or len({part.group for part in parts}) > 1:
            raise QuasarError(f"{', '.join(names)}: int4 projections of one input need one group size, and no shift")
        offset = None
        if any(part.offset is not None for part in parts):
            offset = joined([torch.zeros_like(p.scale) if p.offset is None else p.offset for p in parts])
        return Int4Weights(values, scale, offset, bias)
    statics = [part.static_scale for part in parts if part.static_scale is not None]
    offsets = {part.static_offset for part in parts}
    equal = all(torch.equal(each, statics[0]) for each in statics)
    if len(statics) not in (0, len(parts)) or len(offsets) > 1 or (offsets != {0} and not equal):
        raise QuasarError(f"{', '.join(names)}: projections of one input must quantise it the same way")
    # Symmetric scales that differ: the largest clips nothing, and is what vLLM takes.
    static = torch.stack(statics).amax(dim=0) if statics else None
    return Int8Weights(values, scale, bias, static, offsets.pop(), input_bias, wide=parts[0].wide)


def _precision(weights: LinearWeights) -> str:
    if isinstance(weights, Int8Weights):
        return "W8A16" if weights.wide else "W8A8"
    return "full precision" if isinstance(weights, FullWeights) else "W4A16"


def split(weights: LinearWeights, sizes: list[int]) -> list[LinearWeights]:
    """The projections that `fuse` made one layer of, as views; sizes are their outputs."""
    biases = [None] * len(sizes) if weights.bias is None else weights.bias.split(sizes)
    if isinstance(weights, FullWeights):
        return [FullWeights(*part) for part in zip(weights.weight.split(sizes), biases, strict=True)]
    values, scales = weights.values.split(sizes), weights.scale.split(sizes)
    if isinstance(weights, Int4Weights):
        offsets = [None] * len(sizes) if weights.offset is None else weights.offset.split(sizes)
        return [Int4Weights(*part) for part in zip(values, scales, offsets, biases, strict=True)]
    static = weights.static_scale  # each its own: safetensors does not save one tensor under two names
    return [
        Int8Weights(*part, None if static is None else static.clone(), wide=weights.wide)
        for part in zip(values, scales, biases, strict=True)
    ]


def _rows(part: LinearWeights) -> int:
    return len(part.weight if isinstance(part, FullWeights) else part.values)


def build_decoder(config: ModelConfig, source: TensorSource, backend: Backend, progress: bool = False) -> Decoder:
    """Reads every weight of a checkpoint, once, and puts the decoder on the backend layer by layer."""
    weights = CheckpointWeights(config, source, backend.place)
    decoder = assemble(config, weights, backend, progress)
    weights.finish()
    return decoder
