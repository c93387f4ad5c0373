"""`quasar generate`: text on stdout as it comes, one summary on stderr; or one JSON object."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from quasar.cli import flags, streams
from quasar.errors import QuasarError
from quasar.generation import Generation, GenerationSettings, Result, generate
from quasar.models.chat import Pieces, ReasoningSplitter, splitter_for
from quasar.models.model import Model


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt. By default: the shipped model in W8A8, hybrid drafts, greedy.",
    )
    flags.add_generation_flags(parser)
    flags.add_draft_flag(parser)
    flags.add_draft_store_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_lossless_flag(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print text as it comes (default), or all at the end",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    flags.add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    settings = flags.settings_of(args, args.draft, args.lossless)
    if args.lm_head != "full" and args.precision == "full":
        raise QuasarError(f"--lm-head {args.lm_head} goes with a quantised --precision, not with full")
    model = flags.load_model(args, args.precision, args.lossless)
    ids = flags.prompt_ids(args, model)
    with flags.draft_memory(args, model) as memory:
        answer(args, model, settings, generate(model, ids, settings, draft_memory=memory))


def answer(args: argparse.Namespace, model: Model, settings: GenerationSettings, generation: Generation) -> None:
    """Prints what comes, as the flags want it."""
    ids = generation.prompt_ids
    splitter = splitter_for(model.tokenizer, ids) if args.chat else ReasoningSplitter(None)
    if args.json:
        printed = as_json(generation.result(), model, settings)
        if args.chat:
            printed |= answer_of(printed["text"], splitter)
        streams.print_json(printed)
        return
    if args.stream:
        stream(generation, splitter)
    result = generation.result()
    if args.stream:
        print(flush=True)
    else:
        show(splitter.push(result.text) + splitter.finish())
        print(flush=True)
    print(summary(result), file=sys.stderr)


def stream(generation: Generation, splitter: ReasoningSplitter) -> None:
    """Prints pieces as they become certain."""
    for piece in generation:
        show(splitter.push(piece))
    show(splitter.finish())


def show(pieces: Pieces) -> None:
    """The answer on stdout, the reasoning before it on stderr."""
    for kind, text in pieces:
        print(text, end="", flush=True, file=sys.stdout if kind == "content" else sys.stderr)


def answer_of(text: str, splitter: ReasoningSplitter) -> dict[str, str]:
    """{"text": the answer, "reasoning": what the model thought before it} of a whole text."""
    pieces = splitter.push(text) + splitter.finish()
    return {
        "text": "".join(part for kind, part in pieces if kind == "content"),
        "reasoning": "".join(part for kind, part in pieces if kind == "reasoning"),
    }


def as_json(result: Result, model: Model, settings: GenerationSettings) -> dict[str, Any]:
    """One object for machines."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "stats": result.stats.as_dict(),
        "settings": {
            "model": model.name,
            "device": str(model.decoder.backend.device),
            "backend": model.decoder.backend.name,
            "precision": model.precision,
            **asdict(settings),
        },
        "fidelity": None if model.fidelity is None else asdict(model.fidelity),
    }


def summary(result: Result) -> str:
    """One line of figures."""
    stats = result.stats
    seconds = stats.seconds_prefill + stats.seconds_decode
    return (
        f"[{stats.tokens} tokens in {seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s, {stats.passes} passes, "
        f"acceptance length {stats.acceptance_length:.2f}, {stats.drafted} drafted, {stats.accepted} accepted, "
        f"{stats.weight_bytes_per_token / 1e6:.1f} MB of weights read per token]"
    )
