"""Calibration: what the inputs of the linear layers look like on real text, in memory that does not grow with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from quasar.errors import QuasarError

if TYPE_CHECKING:
    from quasar.models.decoder import Decoder, DecoderLayer

# The linear layers whose inputs SmoothQuant scales, by their name in DecoderLayer.
SMOOTHED = ("qkv", "o", "gate_up", "down")


@dataclass
class InputStats:
    """The inputs of one linear layer: `peak` [in] is the largest magnitude seen in each channel; `rows`
    [sample, in] is a uniform sample of them, kept only where a search over alpha needs real inputs."""

    peak: Tensor
    rows: Tensor
    keys: Tensor  # [sample] random priorities: the rows with the largest survive, whatever order they came in

    def update(self, x: Tensor, sample: int, generator: torch.Generator) -> None:
        """Takes [tokens, in]."""
        x = x.float()
        self.peak = torch.maximum(self.peak, x.abs().amax(dim=0))
        if sample:
            keys = torch.cat([self.keys, torch.rand(len(x), generator=generator)])
            self.keys, kept = keys.topk(min(sample, len(keys)))
            self.rows = torch.cat([self.rows, x])[kept.to(x.device)]


@contextmanager
def observing(layer: DecoderLayer, sample: int = 0) -> Iterator[dict[str, InputStats]]:
    """While it lasts, what runs through an unpacked layer fills the InputStats of its four linear inputs."""
    stats: dict[str, InputStats] = {}
    # Of each layer's own, so that a layer's sample is the same whether or not the others are observed with it.
    generator = torch.Generator().manual_seed(0)

    def observer(name: str) -> Callable[..., None]:
        def observe(_module: torch.nn.Module, args: tuple[Tensor]) -> None:
            x = args[0]
            if name not in stats:
                empty = x.new_zeros(x.shape[1], dtype=torch.float32)
                stats[name] = InputStats(empty, empty[None][:0], torch.empty(0))
            stats[name].update(x, sample, generator)

        return observe

    hooks = [getattr(layer, name).register_forward_pre_hook(observer(name)) for name in SMOOTHED]
    try:
        yield stats
    finally:
        for hook in hooks:
            hook.remove()


def collect(
    decoder: Decoder, sequences: Sequence[Sequence[int]], sample: int = 0, progress: bool = False
) -> list[dict[str, InputStats]]:
    """Runs the sequences of token ids through an unpacked full-precision decoder.

    Returns for each layer the InputStats of its four linear inputs, with `sample` rows each.
    """
    with ExitStack() as stack:
        stats = [stack.enter_context(observing(layer, sample)) for layer in decoder.layers]
        for ids in tqdm(sequences, desc="calibrating", unit="prompt", disable=not progress, leave=False):
            decoder.read(ids)
    return stats


def read_texts(path: Path) -> list[str]:
    """Texts of a JSONL file, one object a line: `text`, `prompt`, `inputs_pretokenized`, or `turns` (joined)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise QuasarError(f"{path}: no such file; it should be JSONL with a text, prompt or turns field") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuasarError(f"{path}: cannot be read as text ({error})") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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
