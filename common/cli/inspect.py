"""`quasar inspect DIR`: what is in a checkpoint, from its headers, and whether it runs here."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.folder import SafetensorsFolder
from quasar.errors import QuasarError
from quasar.models.config import ModelConfig, read_config
from quasar.models.decoder import Decoder
from quasar.models.linear import FullLinear, Linear, W8A8Linear
from quasar.models.linear_int4 import W4A16Linear
from quasar.models.loader import PROJECTIONS, build_decoder
from quasar.models.model import find_checkpoint


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether it runs here",
        description="Show a checkpoint's architecture, the precision of each layer, its bytes by type, what one "
        "verification pass reads, and whether this version runs it; if not, exactly why. Weights are not read.",
    )
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder, shipped model or hub name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    print("\n".join(report(find_checkpoint(args.folder))))


def report(folder: Path) -> list[str]:
    """Lines of what can be said about a folder; what cannot be said is why it does not run."""
    lines, problem = [_line("checkpoint", str(folder))], None
    config = source = None
    try:
        config = read_config(folder)
        lines += _architecture(config)
    except QuasarError as error:
        problem = error
    try:
        source = open_checkpoint(folder)
        lines += [_line("format", source.format), *_bytes(source)]
    except QuasarError as error:
        problem = problem or error
    if config is not None and source is not None:
        try:
            # On the meta device tensors have shapes and no values: all that loading checks, without the reading.
            decoder = build_decoder(config, source, ReferenceBackend("meta", config.dtype))
            lines += _precisions(decoder)
            lines.append(_line("verification pass", f"reads {_size(decoder.weight_bytes_per_pass)} of weights"))
        except QuasarError as error:
            problem = error
    return [*lines, _line("runs here", "yes" if problem is None else f"no: {problem}")]


def _architecture(c: ModelConfig) -> list[str]:
    details = (
        f"{c.architecture}: {c.num_layers} layers, hidden {c.hidden_size}, intermediate {c.intermediate_size}, "
        f"{c.num_heads} query and {c.num_kv_heads} kv heads of {c.head_dim}"
    )
    tied = ", tied to lm_head" if c.tie_word_embeddings else ""
    return [
        _line("architecture", details),
        _line("vocabulary", f"{c.vocab_size}{tied}"),
        _line("context", f"{c.max_position_embeddings} tokens"),
    ]


def _bytes(source: SafetensorsFolder) -> list[str]:
    tensors = source.describe()
    by_type: Counter[str] = Counter()
    for kind, _, size in tensors.values():
        by_type[kind] += size
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in by_type.most_common())
    return [_line("weights", f"{_size(by_type.total())} in {len(tensors)} tensors: {kinds}")]


def _precisions(decoder: Decoder) -> list[str]:
    """Layers of the same precisions share a line."""
    rows: list[tuple[int, int, str]] = []
    for i, layer in enumerate(decoder.layers):
        kinds = {name: _kind(getattr(layer, name)) for name in PROJECTIONS}
        same = len(set(kinds.values())) == 1
        text = kinds["qkv"] if same else ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        if rows and rows[-1][2] == text:
            rows[-1] = (rows[-1][0], i, text)
        else:
            rows.append((i, i, text))
    lines = [_line(f"layer {a}" if a == b else f"layers {a} to {b}", text) for a, b, text in rows]
    return [*lines, _line("lm_head", _kind(decoder.lm_head))]


def _kind(linear: Linear) -> str:
    if isinstance(linear, FullLinear):
        return f"full ({str(linear.stored_as).removeprefix('torch.')})"
    if isinstance(linear, W4A16Linear):
        return "w4a16"
    assert isinstance(linear, W8A8Linear)
    kind = "w8a8" if linear.static_scale is None else "w8a8-static"
    extras = [
        *(["asymmetric activations"] if linear.static_offset else []),
        *(["shifted inputs"] if linear.input_bias is not None else []),
    ]
    return f"{kind} ({', '.join(extras)})" if extras else kind


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _line(what: str, value: str) -> str:
    return f"{what:<18} {value}"
