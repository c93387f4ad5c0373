"""Structural pruning: which layers a decoder misses least (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quasar.models.decoder import Decoder
from quasar.models.sharing import share


def layer_influence(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> list[float]:
    """1 - the mean cosine similarity of each layer's input and output on the residual stream, over all tokens of the
    sequences of ids. Near 0: the layer hardly does anything (section 3.1, "block influence")."""
    # Layers of its own over the same weights: others may run the model meanwhile, and must not meet these hooks.
    decoder = share(decoder)
    total, count = torch.zeros(len(decoder.layers), dtype=torch.float64), sum(map(len, sequences))

    before: dict[int, Tensor] = {}  # taken before the layer runs: a backend may add in place

    def entering(position: int) -> Callable[..., None]:
        def observe(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            before[position] = args[0].clone() if args[1] is None else args[0] + args[1]

        return observe

    def leaving(position: int) -> Callable[..., None]:
        def observe(_module: torch.nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            after = output[0] + output[1]
            similarity = torch.cosine_similarity(before.pop(position).float(), after.float(), dim=-1)
            total[position] += similarity.cpu().double().sum()

        return observe

    for i, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(entering(i))
        layer.register_forward_hook(leaving(i))
    for ids in sequences:
        decoder.read(ids)
    return (1 - total / count).tolist()


def layers_to_keep(decoder: Decoder, skipped: int, sequences: Sequence[Sequence[int]]) -> list[int]:
    """The indices of the layers that are left when those `skipped` of least influence go.

    The first and the last always stay: the one makes the residual stream, the other what lm_head reads.
    """
    influence = layer_influence(decoder, sequences)
    middle = range(1, len(influence) - 1)
    gone = set(sorted(middle, key=lambda i: influence[i])[:skipped])
    return [layer.index for i, layer in enumerate(decoder.layers) if i not in gone]
