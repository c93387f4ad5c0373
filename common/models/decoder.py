"""The one decoder. It knows the order of operations; the backend knows the device, the linear layers the precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quasar.backends.base import AttentionSpec, Backend, Batch, Segment
from quasar.models.config import ModelConfig
from quasar.models.linear import Linear
from quasar.models.rope import inverse_frequencies

CHUNK_ROWS = 512  # of a text in one pass, so that memory grows with the chunk and not with the text


class DecoderLayer(nn.Module):
    """Attention and SwiGLU MLP, each behind an RMSNorm, around one residual stream."""

    def __init__(
        self,
        index: int,
        attention: AttentionSpec,
        eps: float,
        backend: Backend,
        *,
        input_norm: Tensor,
        qkv: Linear,
        o: Linear,
        post_norm: Tensor,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        super().__init__()
        self.index, self.attention, self.eps, self.backend = index, attention, eps, backend
        self.input_norm, self.post_norm = input_norm, post_norm  # [hidden]
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        backend = self.backend
        h, residual = backend.add_rms_norm(x, residual, self.input_norm, self.eps, self.qkv.activation_quant)
        q = backend.append_rotated(self.qkv(h), self.attention, cos, sin, batch, self.index)
        x = self.o(backend.attend(q, self.attention, batch, self.index, self.o.activation_quant))
        h, residual = backend.add_rms_norm(x, residual, self.post_norm, self.eps, self.gate_up.activation_quant)
        x = self.down(backend.swiglu(self.gate_up(h), self.down.activation_quant))
        return x, residual


class Decoder(nn.Module):
    """Token ids in, logits out, over the slots of a batch."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        lm_head: Linear,
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embedding = embedding  # [vocab, hidden]
        self.layers = nn.ModuleList(layers)
        self.attention_specs = [layer.attention for layer in layers]
        self.norm = norm  # [hidden]
        self.lm_head = lm_head
        self.cos, self.sin = rope_tables(config, backend)

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """One pass over the batch's `ids` [rows], on the device.

        Returns logits float32 [kept rows, vocab]. The caller commits what it keeps to the batch's slots.
        """
        rope = self.backend.rope_rows(self.cos, self.sin, self.attention_specs, batch)
        x, residual = self.backend.embed(self.embedding, ids), None
        for layer, (cos, sin) in zip(self.layers, rope, strict=True):
            x, residual = layer(x, residual, cos, sin, batch)
        x, residual = self.backend.kept(x, batch), self.backend.kept(residual, batch)
        if not len(x):
            return x.new_empty(0, self.config.vocab_size)
        h, _ = self.backend.add_rms_norm(
            x, residual, self.norm, self.config.rms_norm_eps, self.lm_head.activation_quant
        )
        return self.backend.logits(self.lm_head, h)

    def read(self, ids: Sequence[int], logits_to_keep: int = 0) -> Tensor:
        """Runs a text by itself, in chunks; logits float32 [logits_to_keep, vocab] of its last tokens.

        For calibration and measurements: nothing is captured and nothing kept.
        """
        c = self.config
        ids = [int(token) for token in ids]
        slot = self.backend.new_slot(c.num_layers, c.num_kv_heads, len(ids), c.head_dim)
        kept = []
        for first in range(0, len(ids), CHUNK_ROWS):
            chunk = ids[first : first + CHUNK_ROWS]
            keep = min(len(chunk), max(0, logits_to_keep - (len(ids) - first - len(chunk))))
            batch = Batch([Segment(slot, chunk, logits_to_keep=keep)])
            kept.append(self(torch.tensor(chunk, device=self.backend.device), batch))
            slot.commit(len(chunk))
        return torch.cat(kept)

    def linears(self) -> list[Linear]:
        """Every linear layer, lm_head last."""
        inner = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [*inner, self.lm_head]

    @property
    def weight_bytes_per_pass(self) -> int:
        """Bytes of weights that one pass reads: every linear layer once, and the norms (an embedding row is noise)."""
        norms = [self.norm, *(norm for layer in self.layers for norm in (layer.input_norm, layer.post_norm))]
        return sum(linear.nbytes for linear in self.linears()) + sum(n.numel() * n.element_size() for n in norms)


def rope_tables(config: ModelConfig, backend: Backend) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [max_position_embeddings, head_dim / 2] on the device (Su et al. 2021)."""
    if backend.device.type == "meta":  # only shapes are asked for
        empty = torch.empty(config.max_position_embeddings, config.head_dim // 2, device="meta")
        return empty, empty
    frequency = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    magnitude = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    angle = torch.arange(config.max_position_embeddings).float()[:, None] * frequency
    dtype = torch.float64 if backend.dtype == torch.float64 else torch.float32
    return (angle.cos() * magnitude).to(backend.device, dtype), (angle.sin() * magnitude).to(backend.device, dtype)
