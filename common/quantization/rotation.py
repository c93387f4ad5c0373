"""Hadamard rotation (QuaRot, arXiv 2404.00456): spread outliers over all channels before 4-bit rounding.

The residual stream and each v head are rotated by folding the rotation into the weights on both sides, which costs
nothing; only the input of down_proj, behind the SwiGLU's product, is rotated while running. In full precision nothing
changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quasar.checkpoints.weights import FullWeights, HeadWeights, LayerWeights
from quasar.models.config import ModelConfig

ONLINE_BLOCK = 128  # of down_proj's rotation: small enough to cost nothing beside its weights


def hadamard(features: int, limit: int | None = None) -> Tensor:
    """The normalised Sylvester-Hadamard matrix float32 [block, block], its own inverse. The block is the largest
    power of two that divides `features`, at most `limit`: features are rotated block by block."""
    block = features & -features
    block = min(block, limit) if limit else block
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * block**-0.5


def rotate_last(x: Tensor, matrix: Tensor) -> Tensor:
    """The last dimension, block by block, times the matrix; float32."""
    return (x.float().unflatten(-1, (-1, len(matrix))) @ matrix.to(x.device)).flatten(-2)


class Rotation:
    """The rotations of one model, folded into one part of its weights at a time."""

    def __init__(self, config: ModelConfig) -> None:
        self.residual = hadamard(config.hidden_size)
        self.online = hadamard(config.intermediate_size, ONLINE_BLOCK)
        self.head = hadamard(config.head_dim)
        self._v_rows = config.num_kv_heads * config.head_dim

    def embedding(self, table: Tensor) -> Tensor:
        """[vocab, hidden], in the type it had."""
        return rotate_last(table, self.residual).to(table.dtype)

    def layer(self, layer: LayerWeights) -> LayerWeights:
        """The rotated layer: its norms are 1, and its down projection rotates its input first."""
        qkv, o = self._rotate_v(layer.qkv, layer.o)
        down = self._rotated_out(layer.down)
        return replace(
            layer,
            input_norm=torch.ones_like(layer.input_norm),
            qkv=self._rotated_in(qkv, layer.input_norm),
            o=self._rotated_out(o),
            post_norm=torch.ones_like(layer.post_norm),
            gate_up=self._rotated_in(layer.gate_up, layer.post_norm),
            down=replace(down, weight=rotate_last(down.weight, self.online), hadamard=self.online),
        )

    def top(self, head: HeadWeights) -> HeadWeights:
        """The rotated head. lm_head loses its tie to the embedding, and keeps its type."""
        full = head.lm_head
        rotated = self._rotated_in(full, head.norm)
        lm_head = replace(rotated, weight=rotated.weight.to(full.weight.dtype))
        return HeadWeights(torch.ones_like(head.norm), lm_head)

    def _rotated_in(self, full: FullWeights, norm: Tensor) -> FullWeights:
        """Takes a rotated input; the norm's weights go in here, since a rotation does not commute with them."""
        weight = full.weight.float() * norm.to(full.weight.device, torch.float32)
        return FullWeights(rotate_last(weight, self.residual), full.bias)

    def _rotated_out(self, full: FullWeights) -> FullWeights:
        """Gives a rotated output."""
        bias = None if full.bias is None else rotate_last(full.bias, self.residual)
        return FullWeights(rotate_last(full.weight.t(), self.residual).t().contiguous(), bias)

    def _rotate_v(self, qkv: FullWeights, o: FullWeights) -> tuple[FullWeights, FullWeights]:
        """Rotates every v head, and o_proj's view of it."""
        rows = self._v_rows

        def rotated(values: Tensor) -> Tensor:  # [..., qkv outputs]: only v's, the last, change
            return torch.cat([values[..., :-rows].float(), rotate_last(values[..., -rows:], self.head)], dim=-1)

        bias = None if qkv.bias is None else rotated(qkv.bias)
        turned = FullWeights(rotated(qkv.weight.t()).t().contiguous(), bias)
        return turned, FullWeights(rotate_last(o.weight, self.head), o.bias)
