"""Rotation tables in the form that one npu_rotary_mul per layer takes.

All heads of a layer are rotated by one launch, each by rows of its own, so a layer's constants ride along for free:

- values, which must come out as they went in, get cos 1 and sin 0 (models without q and k norms). q, k and v then
  leave the operator in one tensor, and one scatter appends k and v.
- the weights of the q and k norms are folded into cos and sin (models with them). The norm before is then one launch
  with the same weight for every head. Since the operator's tables may not exceed 1, that weight is the power of two
  above the largest: it cancels exactly.

The tables are rounded once, to the activations' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quasar.backends.base import AttentionSpec

_TOGETHER = 16  # passes up to this long (windows) get the rows of all layers at once; longer ones layer by layer


class LayerGains:
    """What a layer's heads make of cos and sin: rows * scale + offset, both float32 [2 (cos, sin), 1, heads, head_dim].

    `norm` [head_dim] is the one weight that is left to the norm of q and k; None for models without norms.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        if spec.q_norm is None or spec.k_norm is None:
            # q and k as they are, v unturned.
            turned = torch.tensor([1.0] * (spec.heads + spec.kv_heads) + [0.0] * spec.kv_heads)
            scale = turned.view(1, 1, -1, 1).expand(2, 1, -1, spec.head_dim)
            offset = (1 - scale) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
            self.scale, self.offset, self.norm = scale.contiguous().to(device), offset.to(device), None
            return
        q, k = spec.q_norm.float().cpu(), spec.k_norm.float().cpu()
        peak = max(q.abs().max().item(), k.abs().max().item())
        power = 2.0 ** math.ceil(math.log2(peak)) if peak > 0 else 1.0
        weights = torch.stack([q] * spec.heads + [k] * spec.kv_heads) / power  # [heads + kv_heads, head_dim]
        # sin multiplies the turned vector, whose halves have changed places.
        scale = torch.stack([weights, weights.roll(spec.head_dim // 2, dims=-1)])[:, None]
        self.scale, self.offset = scale.to(device), None
        self.norm = torch.full_like(spec.q_norm, power)

    def rotations(self, cos: Tensor, sin: Tensor, dtype: torch.dtype, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """From plain rows [tokens, head_dim / 2] to what npu_rotary_mul takes, for this layer alone."""
        made = _apply(doubled(cos, sin)[:, :, None], self.scale, self.offset).to(dtype)  # [2, tokens, heads, head_dim]
        return _flat(_ordered(made[:, None], order)[:, 0])


class RopeTables:
    """For one decoder: cos, sin float32 [positions, head_dim / 2] and the gains of its layers."""

    def __init__(self, cos: Tensor, sin: Tensor, gains: Sequence[LayerGains], dtype: torch.dtype) -> None:
        self._dtype, self._layers = dtype, len(gains)
        self._table = doubled(cos, sin)  # [2, positions, head_dim]
        self._shared = all(layer is gains[0] for layer in gains)  # without norms every layer has the same rows
        layers = gains[:1] if self._shared else gains
        self._scale = torch.stack([layer.scale for layer in layers], dim=1)  # [2, layers, heads, 1, head_dim]
        self._offset = None if gains[0].offset is None else gains[0].offset[:, None]

    def rows(
        self, start: int, tokens: int, positions: Tensor | None, order: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer cos, sin [1, tokens * heads, 1, head_dim], in the `order` in which a pass has its rows.

        Device-held positions [tokens] replace `start`.
        """
        table = self._table
        rows = table[:, start : start + tokens] if positions is None else table.index_select(1, positions)
        rows = rows[:, None, :, None]  # [2, 1, tokens, 1, head_dim]
        if self._shared or tokens <= _TOGETHER:
            made = _apply(rows, self._scale, self._offset).to(self._dtype)  # [2, layers, tokens, heads, head_dim]
            made = _ordered(made, order)
            for layer in range(self._layers):
                yield _flat(made[:, 0 if self._shared else layer])
        else:
            for layer in range(self._layers):
                scale = self._scale[:, layer : layer + 1]
                yield _flat(_ordered(_apply(rows, scale, self._offset).to(self._dtype), order)[:, 0])


def doubled(cos: Tensor, sin: Tensor) -> Tensor:
    """[positions, head_dim / 2] each -> [2, positions, head_dim]: the "half" layout turns both halves alike."""
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)])


def _apply(rows: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """rows [2, ..., tokens, 1, head_dim] -> float32 [2, ..., tokens, heads, head_dim]."""
    return rows * scale if offset is None else torch.addcmul(offset, rows, scale)


def _ordered(made: Tensor, order: Tensor | None) -> Tensor:
    """[2, layers, tokens, heads, head_dim] -> [2, layers, tokens * heads, head_dim], in the order of a pass's rows."""
    flat = made.flatten(2, 3)
    return flat if order is None else flat.index_select(2, order)


def _flat(pair: Tensor) -> tuple[Tensor, Tensor]:
    """[2, rows, head_dim] -> two of [1, rows, 1, head_dim], which is what "BSND" rotates."""
    cos, sin = (half.reshape(1, -1, 1, half.shape[-1]) for half in pair)
    return cos, sin
