"""A model quantised layer by layer, in the memory of one layer beside what is made of it.

Hidden states of texts walk through the layers: calibration texts in full precision, which each layer is quantised by,
and held-out texts in full precision and quantised, which show at the end what quantising did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import Backend, Batch, Segment
from quasar.checkpoints.weights import HeadWeights, LayerWeights
from quasar.models.build import WeightSource, build, build_layer
from quasar.models.config import ModelConfig
from quasar.models.decoder import Decoder, DecoderLayer, rope_tables
from quasar.models.fidelity import Fidelity
from quasar.models.linear import Linear
from quasar.quantization.calibration import InputStats, observing
from quasar.quantization.fidelity import FidelityTally
from quasar.quantization.methods import Method, int8_head
from quasar.quantization.rounding import static_scale

_PASS_ROWS = 1024  # of texts that go through a layer together
_HEAD_ROWS = 64  # whose distributions are in memory together: more would be new pages for every step of the comparison


@dataclass
class HiddenStates:
    """Of each text, [tokens, hidden], in front of the same layer."""

    calibrated: list[Tensor]  # calibration texts, in full precision, in the form that the method prepares
    full: list[Tensor]  # held-out texts in full precision
    quantized: list[Tensor]  # held-out texts through the quantised layers


class LayerQuantizer:
    """One model, one method, and the texts."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        backend: Backend,
        method: Method,
        calibration: Sequence[Sequence[int]],
        heldout: Sequence[Sequence[int]] = (),
    ) -> None:
        """calibration and heldout are token ids; the last id of a held-out text is only predicted."""
        method.check(backend)
        self.config = config
        self.source = source
        self.backend = backend
        self.method = method
        self.calibration = calibration if method.calibrates else []
        self.heldout = heldout
        longest = max([1, *map(len, [*self.calibration, *heldout])])
        self._cos, self._sin = rope_tables(replace(config, max_position_embeddings=longest), backend)

    @torch.inference_mode()
    def start(self) -> HiddenStates:
        """In front of the first layer."""
        table = self.source.embedding()
        made = self.method.embedding(table)
        return HiddenStates(
            [self.embed(made, ids) for ids in self.calibration],
            [self.embed(table, ids[:-1]) for ids in self.heldout],
            [self.embed(made, ids[:-1]) for ids in self.heldout],
        )

    @torch.inference_mode()
    def layer(self, index: int, states: HiddenStates) -> tuple[LayerWeights, DecoderLayer, HiddenStates]:
        """The quantised layer as weights and ready to run, and the hidden states behind it."""
        weights = self.source.layer(index)
        prepared = self.method.prepare(weights)
        stats: dict[str, InputStats] = {}
        calibrated, full = states.calibrated, states.full
        same = prepared is weights
        if calibrated:
            layer = self.build(prepared)
            with observing(layer, self.method.sample, self.method.moments) as stats:
                calibrated = self.through(layer, calibrated)
        if full:
            layer = layer if calibrated and same else self.build(weights)
            full = self.through(layer, full)
        layer = None  # one layer at a time
        made = self.method.round(self.method.adapt(prepared, stats), stats)
        layer = self.build(made)
        quantized = self.through(layer, states.quantized)
        layer.index = index
        return made, layer, HiddenStates(calibrated, full, quantized)

    @torch.inference_mode()
    def head(
        self, states: HiddenStates, lm_head: str = "full", static: bool = False
    ) -> tuple[HeadWeights, Linear, Fidelity | None]:
        """The quantised head, its lm_head ready to run, and the figures over the held-out texts, None without any.

        lm_head "w8a8" makes that layer int8 too; static gives its inputs one scale.
        """
        before = self.source.head(self.source.embedding())
        after = self.method.head(before)
        if lm_head == "w8a8":
            scale = None
            if static:
                normed = [self._normed(x, after.norm) for x in states.calibrated]
                scale = static_scale(torch.stack([x.float().abs().amax(dim=0) for x in normed]).amax(dim=0))
            after = int8_head(after, scale, "lm_head" in self.method.wide)
        quantized = build(after.lm_head, self.backend)
        if not self.heldout:
            return after, quantized, None
        full = quantized if after.lm_head is before.lm_head else build(before.lm_head, self.backend)
        tally = FidelityTally()
        for text in zip(states.full, states.quantized, self.heldout, strict=True):
            for at in range(0, len(text[0]), _HEAD_ROWS):
                x, y, ids = (each[at : at + _HEAD_ROWS] for each in (*text[:2], text[2][1:]))
                tally.add(self.log_probs(full, before.norm, x), self.log_probs(quantized, after.norm, y), ids)
        return after, quantized, tally.figures()

    def log_probs(self, lm_head: Linear, norm: Tensor, x: Tensor) -> Tensor:
        """Hidden states [tokens, hidden] -> float32 [tokens, vocab]."""
        return self.backend.logits(lm_head, self._normed(x, norm)).log_softmax(dim=-1)

    def build(self, weights: LayerWeights) -> DecoderLayer:
        """The layer, ready for `through`."""
        return build_layer(self.config, replace(weights, index=0), self.backend)  # 0: in a KV cache of its own

    def embed(self, table: Tensor, ids: Sequence[int]) -> Tensor:
        """Token ids -> [tokens, hidden]."""
        table = self.backend.place(table)
        return self.backend.embed(table, torch.tensor(ids, device=self.backend.device))

    def through(self, layer: DecoderLayer, texts: Sequence[Tensor]) -> list[Tensor]:
        """Of each text, [tokens, hidden] -> [tokens, hidden], from position 0. Short texts share a pass."""
        made: list[Tensor] = []
        while len(made) < len(texts):
            rows, together = 0, []
            for x in texts[len(made) :]:
                rows += len(x)
                if together and rows > _PASS_ROWS:
                    break
                together.append(x)
            made += self._pass(layer, together)
        return made

    def _pass(self, layer: DecoderLayer, texts: list[Tensor]) -> list[Tensor]:
        c, sizes = self.config, [len(x) for x in texts]
        with self.backend.exact_kv():
            slots = [self.backend.new_slot(1, c.num_kv_heads, size, c.head_dim) for size in sizes]
        batch = Batch([Segment(slot, [0] * size) for slot, size in zip(slots, sizes, strict=True)])
        (rope,) = self.backend.rope_rows(self._cos, self._sin, [layer.attention], batch)
        y, residual = layer(torch.cat(texts), None, *rope, batch)  # a copy: backends may add to their input in place
        return list((y + residual).split(sizes))

    def _normed(self, x: Tensor, norm: Tensor) -> Tensor:
        norm = self.backend.place(norm).to(self.backend.dtype)
        return self.backend.add_rms_norm(x.clone(), None, norm, self.config.rms_norm_eps, None)[0]


class WeightSink(Protocol):
    """What takes the parts of a quantised model, such as a cache."""

    def layer(self, weights: LayerWeights) -> None:
        """One decoder layer."""

    def embedding(self, table: Tensor) -> None:
        """[vocab, hidden]."""

    def head(self, weights: HeadWeights, embedding: Tensor) -> None:
        """The last norm and lm_head, which may be the embedding."""


def quantized_decoder(
    config: ModelConfig,
    source: WeightSource,
    backend: Backend,
    method: Method,
    calibration: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]] = (),
    lm_head: str = "full",
    progress: bool = False,
    keep: WeightSink | None = None,
) -> tuple[Decoder, Fidelity | None]:
    """The quantised model on the backend, and what quantising did to held-out texts, None without any.

    keep is handed every part as it is made.
    """
    quantizer = LayerQuantizer(config, source, backend, method, calibration, heldout)
    states = quantizer.start()
    layers = []
    bar = tqdm(range(config.num_layers), desc="quantising", unit="layer", disable=not progress, leave=False)
    for index in bar:
        made, layer, states = quantizer.layer(index, states)
        layers.append(layer)
        if keep is not None:
            keep.layer(made)
    head, linear, fidelity = quantizer.head(states, lm_head)
    embedding = backend.place(method.embedding(source.embedding()))
    if keep is not None:
        keep.embedding(embedding)
        keep.head(head, embedding)
    norm = backend.place(head.norm).to(backend.dtype)
    return Decoder(config, backend, embedding=embedding, layers=layers, norm=norm, lm_head=linear), fidelity
