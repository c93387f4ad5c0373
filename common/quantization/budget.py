"""Which inputs stay in 16 bits: those whose rounding costs most, per byte, measured at the model's output."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import Backend
from quasar.checkpoints.weights import LINEARS, FullWeights
from quasar.models.build import WeightSource, build
from quasar.models.config import ModelConfig
from quasar.quantization.calibration import observing
from quasar.quantization.methods import W8A8
from quasar.quantization.stream import LayerQuantizer

_CANDIDATES = 24  # that are measured at the output, or more where the budget holds more
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class Kept:
    """One linear layer that stays in 16 bits."""

    layer: int
    name: str
    kl: float  # mean, nats, of the model with this one in int8 and all others in full precision
    nbytes: int  # more than in int8


@dataclass(order=True)
class _Candidate:
    damage: float
    order: int
    layer: int = field(compare=False)
    name: str = field(compare=False)
    nbytes: int = field(compare=False)
    hidden: list[Tensor] = field(compare=False)


@torch.inference_mode()
def choose_kept(
    config: ModelConfig,
    source: WeightSource,
    backend: Backend,
    method: W8A8,
    calibration: Sequence[Sequence[int]],
    budget: int,
    progress: bool = False,
) -> list[Kept]:
    """The linear layers to keep, best first, within `budget` bytes more than int8 takes.

    A part of the calibration texts walks through the layers in full precision. At each layer the same texts also walk
    through each of its four linear layers in int8 alone; the few that disturb the residual stream most walk on, in full
    precision, to the output, where their KL is measured.
    """
    texts, tokens = [], 0
    for ids in calibration:
        if tokens < _PROBE_TOKENS:
            texts.append(list(ids[: _PROBE_TOKENS - tokens]))
            tokens += len(texts[-1])
    walk = LayerQuantizer(config, source, backend, method, calibration, [])
    table = source.embedding()
    calibrated = [walk.embed(table, ids) for ids in walk.calibration]
    probe = [walk.embed(table, ids) for ids in texts]
    candidates: list[_Candidate] = []
    order, room = 0, 0
    bar = tqdm(range(config.num_layers), desc="measuring", unit="layer", disable=not progress, leave=False)
    for index in bar:
        weights = source.layer(index)
        layer = walk.build(weights)
        with observing(layer, method.sample, method.moments) as stats:
            calibrated = walk.through(layer, calibrated)
        after = walk.through(layer, probe)
        for candidate in candidates:
            candidate.hidden = walk.through(layer, candidate.hidden)
        adapted = method.adapt(weights, stats)
        made = method.round(adapted, stats)
        layer = walk.build(adapted)
        for name in LINEARS:
            full = getattr(layer, name)
            setattr(layer, name, build(getattr(made, name), backend))
            hidden = walk.through(layer, probe)
            setattr(layer, name, full)
            damage = _damage(hidden, after)
            size = getattr(made, name).values.numel() * (config.dtype.itemsize - 1)
            order += 1
            if size <= budget:
                heapq.heappush(candidates, _Candidate(damage, order, index, name, size, hidden))
                room += size
            if len(candidates) > _CANDIDATES and room - candidates[0].nbytes > 2 * budget:
                room -= heapq.heappop(candidates).nbytes
        probe = after
    head = source.head(table)
    assert isinstance(head.lm_head, FullWeights)
    lm_head = build(head.lm_head, backend)
    before = [walk.log_probs(lm_head, head.norm, x) for x in probe]
    measured = []
    for candidate in candidates:
        kl = 0.0
        for full, x in zip(before, candidate.hidden, strict=True):
            changed = walk.log_probs(lm_head, head.norm, x)
            kl += (full.exp() * (full - changed)).sum().item()
        measured.append(Kept(candidate.layer, candidate.name, kl / tokens, candidate.nbytes))
    kept = []
    for choice in sorted(measured, key=lambda each: each.kl / each.nbytes, reverse=True):
        if choice.nbytes <= budget:
            kept.append(choice)
            budget -= choice.nbytes
    return kept


def describe(kept: Sequence[Kept], of: int) -> str:
    """What was chosen and what it bought, in a line; of: the bytes of a pass without."""
    layers = ", ".join(f"layer {each.layer} {each.name}" for each in kept)
    bytes_more, kl = sum(each.nbytes for each in kept), sum(each.kl for each in kept)
    if not kept:
        return "no input stays in 16 bits: none fits the budget"
    return f"in 16 bits: {layers}; {kl:.1e} nats less KL, each measured alone, for {bytes_more / of:.1%} more bytes"


def _damage(changed: list[Tensor], before: list[Tensor]) -> float:
    """The mean, over tokens, of the change of the residual stream against its own size, squared."""
    shares = [
        (x - y).float().square().mean(dim=-1) / y.float().square().mean(dim=-1)
        for x, y in zip(changed, before, strict=True)
    ]
    return torch.cat(shares).mean().item()
