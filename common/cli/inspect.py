"""`quasar inspect DIR`: what is in a checkpoint, from its headers, and whether it runs here."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.errors import QuasarError
from quasar.models.config import read_config
from quasar.models.decoder import Decoder
from quasar.models.find import find_checkpoint
from quasar.models.linear import FullLinear, Linear, W8A8Linear
from quasar.models.linear_int4 import W4A16Linear
from quasar.models.loader import PROJECTIONS
from quasar.models.opening import OpenedCheckpoint, check_shapes, open_parts
from quasar.models.tokenizer import Tokenizer


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether it runs here",
        description="Show a checkpoint's architecture, the precision of each layer, its bytes by type, what one "
        "verification pass reads, and whether this version runs it; if not, exactly why. Weights are not read.",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 where it does not run here")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the checkpoint's tokenizer is"
    )
    parser.add_argument("folder", metavar="MODEL", help="checkpoint folder, GGUF file, shipped model or hub name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    lines, problem = report(find_checkpoint(args.folder, args.trust_remote_code), args.trust_remote_code)
    print("\n".join(lines))
    return 1 if args.check and problem is not None else 0


def report(path: Path, trust_remote_code: bool = False) -> tuple[list[str], QuasarError | None]:
    """Lines of what can be said about a checkpoint, and why it does not run; None where it does."""
    lines = [_line("checkpoint", str(path))]
    # Each part by itself, so that a broken one does not hide the others.
    for describe in (_architecture, _format):
        with suppress(QuasarError):
            lines += describe(path)
    problem = None
    try:
        # As `load` does, on the meta device, where tensors have shapes and no values: nothing is read.
        opened = open_parts(path, trust_remote_code)
        lines += _tokenizer(opened)
        decoder = check_shapes(opened.config, opened.source)
        lines += _precisions(decoder)
        lines.append(_line("verification pass", f"reads {_size(decoder.weight_bytes_per_pass)} of weights"))
        get_backend()
    except QuasarError as error:
        problem = error
    return [*lines, _line("runs here", "yes" if problem is None else f"no: {problem}")], problem


def _architecture(path: Path) -> list[str]:
    c = read_config(path)
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


def _format(path: Path) -> list[str]:
    source = open_checkpoint(path)
    tensors = source.describe()
    by_type: Counter[str] = Counter()
    for kind, _, size in tensors.values():
        by_type[kind] += size
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in by_type.most_common())
    total = f"{_size(by_type.total())} in {len(tensors)} tensors: {kinds}"
    return [_line("format", source.format), _line("weights", total)]


def _tokenizer(opened: OpenedCheckpoint) -> list[str]:
    tokenizer = opened.tokenizer
    if tokenizer is None:
        return [_line("tokenizer", "none: prompts are token ids (--prompt-ids)")]
    template = "with a chat template" if tokenizer.chat_template else "no chat template"
    if isinstance(tokenizer, Tokenizer):
        try:
            tokenizer.check_chat_template()
        except QuasarError as error:
            template = f"but --chat does not run: {error}"
    return [_line("tokenizer", f"{len(tokenizer)} tokens, {template}")]


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
    if linear.wide:
        return "w8a16"
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
