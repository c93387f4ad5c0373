"""Hadamard rotation (QuaRot, arXiv 2404.00456): spread outliers over all channels before 4-bit rounding.

The residual stream and each v head are rotated by folding the rotation into the weights on both sides, which costs
nothing; only the input of down_proj, behind the SwiGLU's product, is rotated while running. In full precision nothing
changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quasar.models.linear import FullLinear

if TYPE_CHECKING:
    from quasar.models.decoder import Decoder, DecoderLayer

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


def rotate_decoder(decoder: Decoder) -> Tensor:
    """Folds the rotations into an unpacked full-precision decoder, whose norms become 1 and whose lm_head loses its
    tie to the embedding. Returns the matrix by which down_proj's input is yet to be rotated."""
    residual = hadamard(decoder.config.hidden_size)
    online = hadamard(decoder.config.intermediate_size, ONLINE_BLOCK)
    decoder.embedding = rotate_last(decoder.embedding, residual).to(decoder.embedding.dtype)
    for layer in decoder.layers:
        _rotate_v(layer)
        layer.qkv = _rotated_in(layer.qkv, layer.input_norm, residual)
        layer.gate_up = _rotated_in(layer.gate_up, layer.post_norm, residual)
        layer.o = _rotated_out(layer.o, residual)
        layer.down = _rotated_out(layer.down, residual)
        layer.down.weight = rotate_last(layer.down.weight, online)
        layer.input_norm = torch.ones_like(layer.input_norm)
        layer.post_norm = torch.ones_like(layer.post_norm)
    stored_as = decoder.lm_head.weight.dtype  # the one matrix that stays in full precision
    decoder.lm_head = _rotated_in(decoder.lm_head, decoder.norm, residual)
    decoder.lm_head.weight = decoder.lm_head.weight.to(stored_as)
    decoder.norm = torch.ones_like(decoder.norm)
    return online.to(decoder.backend.device, decoder.backend.dtype)


def _rotated_in(linear: FullLinear, norm: Tensor, matrix: Tensor) -> FullLinear:
    """Takes a rotated input; the norm's weights go in here, since a rotation does not commute with them."""
    return FullLinear(linear.backend, rotate_last(linear.weight.float() * norm.float(), matrix), linear.bias)


def _rotated_out(linear: FullLinear, matrix: Tensor) -> FullLinear:
    """Gives a rotated output."""
    bias = None if linear.bias is None else rotate_last(linear.bias, matrix)
    return FullLinear(linear.backend, rotate_last(linear.weight.t(), matrix).t().contiguous(), bias)


def _rotate_v(layer: DecoderLayer) -> None:
    """Rotates every v head, and o_proj's view of it."""
    spec = layer.attention
    matrix = hadamard(spec.head_dim)
    rows = spec.kv_heads * spec.head_dim

    def rotated(values: Tensor) -> Tensor:  # [..., qkv outputs]: only v's, the last, change
        return torch.cat([values[..., :-rows].float(), rotate_last(values[..., -rows:], matrix)], dim=-1)

    bias = None if layer.qkv.bias is None else rotated(layer.qkv.bias)
    layer.qkv = FullLinear(layer.qkv.backend, rotated(layer.qkv.weight.t()).t().contiguous(), bias)
    layer.o = FullLinear(layer.o.backend, rotate_last(layer.o.weight, matrix), layer.o.bias)
