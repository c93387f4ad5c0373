"""Calibration: what the inputs of the linear layers look like on real text, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quasar.checkpoints.weights import LINEARS
from quasar.errors import QuasarError
from quasar.models.decoder import DecoderLayer
from quasar.models.linear import FullLinear
from quasar.reading import parse_json, read_lines

_BLOCK = 288  # channels whose moments are summed together, and those of channels behind them not twice


@dataclass
class InputStats:
    """The inputs of one linear layer: `peak` [in] is the largest magnitude seen in each channel; `rows`
    [sample, in] is a uniform sample of them, and `moments` [in, in] the weighted sum of x x^T over all of them, each
    kept only where a method asks for it.

    A token's weight is 1 over the mean square of the residual stream in front of the layer: the next norm divides by
    it, so an error on a loud token (the first of a text is often a thousand times as loud) matters that much less.
    """

    peak: Tensor
    rows: Tensor
    weights: Tensor  # [sample] of the rows
    keys: Tensor  # [sample] random priorities: the rows with the largest survive, whatever order they came in
    moments: Tensor | None = None

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu", moments: bool = False) -> InputStats:
        """Before anything was seen."""
        peak = torch.zeros(features, device=device)
        square = torch.zeros(features, features, device=device) if moments else None
        return cls(peak, peak[None][:0], peak[:0], torch.empty(0), square)

    def update(self, x: Tensor, weights: Tensor | None, sample: int, generator: torch.Generator) -> None:
        """Takes [tokens, in] and [tokens], None for weights of 1."""
        x = x.float()
        self.peak = torch.maximum(self.peak, torch.maximum(x.amax(dim=0), -x.amin(dim=0)))
        if self.moments is not None:
            weighted = x if weights is None else x * weights[:, None]
            for first in range(0, len(self.peak), _BLOCK):  # `finish` mirrors them
                last = first + _BLOCK
                self.moments[first:last, :last].addmm_(weighted[:, first:last].t(), x[:, :last])
        weights = x.new_ones(len(x)) if weights is None else weights
        if sample:
            keys = torch.cat([self.keys, torch.rand(len(x), generator=generator)])
            self.keys, kept = keys.topk(min(sample, len(keys)))
            stay = kept < len(self.rows)
            old, new = kept[stay].to(x.device), (kept[~stay] - len(self.rows)).to(x.device)
            self.keys = torch.cat([self.keys[stay], self.keys[~stay]])
            self.rows = torch.cat([self.rows[old], x[new]])
            self.weights = torch.cat([self.weights[old], weights[new]])

    def finish(self) -> None:
        """Called when all was seen: completes the moments."""
        if self.moments is not None:
            for first in range(_BLOCK, len(self.peak), _BLOCK):
                last = first + _BLOCK
                self.moments[:first, first:last] = self.moments[first:last, :first].t()

    def divide(self, scales: Tensor) -> None:
        """What would have been seen if every channel had been divided by its scale [in]."""
        self.peak = self.peak / scales
        self.rows = self.rows / scales
        if self.moments is not None:
            self.moments = self.moments / scales / scales[:, None]


@contextmanager
def observing(layer: DecoderLayer, sample: int = 0, moments: bool = False) -> Iterator[dict[str, InputStats]]:
    """While it lasts, what runs through a full-precision layer fills the InputStats of its four linear inputs.

    The layer has to be the caller's own: others that run it would be counted too. Its inputs come as one tensor, the
    residual stream [tokens, hidden].
    """
    stats: dict[str, InputStats] = {}
    weights = torch.empty(0)

    def weigh(_module: DecoderLayer, args: tuple[Any, ...]) -> None:
        nonlocal weights
        weights = 1 / args[0].float().square().mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)

    def observer(name: str) -> Callable[..., None]:
        # Of each layer's own, so that a layer's sample is the same whether or not the others are observed with it.
        generator = torch.Generator().manual_seed(0)

        def observe(module: FullLinear, args: tuple[Tensor]) -> None:
            x = args[0]
            if module.hadamard is not None:
                x = module.backend.rotate(x, module.hadamard)
            if name not in stats:
                stats[name] = InputStats.empty(x.shape[1], x.device, moments)
            of = weights if name in ("o", "down") else None  # the others' inputs are normalised
            stats[name].update(x, of, sample, generator)

        return observe

    hooks = [layer.register_forward_pre_hook(weigh)]
    hooks += [getattr(layer, name).register_forward_pre_hook(observer(name)) for name in LINEARS]
    try:
        yield stats
    finally:
        for hook in hooks:
            hook.remove()
        for each in stats.values():
            each.finish()


def read_texts(path: Path) -> list[str]:
    """Texts of a JSONL file, one object a line: `text`, `prompt`, `inputs_pretokenized`, or `turns` (joined)."""
    texts = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            raise QuasarError(f"{path}:{number}: not JSON; each line should be one JSON object") from None
        text = _text_of(row)
        if not text:
            raise QuasarError(f"{path}:{number}: no text; a row needs a text, prompt or turns field")
        texts.append(text)
    if not texts:
        raise QuasarError(f"{path}: holds no texts")
    return texts


def _text_of(row: object) -> str | None:
    if not isinstance(row, dict):
        return None
    for name in ("text", "prompt", "inputs_pretokenized"):
        if isinstance(row.get(name), str):
            return row[name]
    turns = row.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return "\n".join(turns)
    return None
