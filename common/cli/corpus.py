"""`quasar corpus build`: fill a draft store from files, before the first request."""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from quasar.cli.replay import read_tokenizer
from quasar.drafting.corpus import MOST_TOKENS
from quasar.drafting.store import CorpusStore, tokenizer_fingerprint
from quasar.errors import QuasarError
from quasar.evaluation.replay import read_log


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "corpus", help="prepare earlier text to draft from", description="Earlier text as a source of drafts."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="build")
    build = kinds.add_parser(
        "build",
        help="fill a draft store from files",
        description="Adds files to a draft store, which --draft-store DIR then drafts from: JSONL of traces or OpenAI "
        "chats, or .txt files. The oldest text goes where it exceeds --max-tokens.",
    )
    build.add_argument("files", nargs="+", metavar="FILE")
    build.add_argument("--draft-store", required=True, metavar="DIR", help="the folder; made where there is none")
    build.add_argument("--model", required=True, metavar="M", help="whose tokenizer the store is for")
    build.add_argument("--trust-remote-code", action="store_true", help="run Python code that the tokenizer brings")
    build.add_argument(
        "--max-tokens", type=int, default=MOST_TOKENS, metavar="N", help="kept at most (default: %(default)s)"
    )
    build.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.max_tokens < 2:
        raise QuasarError(f"--max-tokens {args.max_tokens}: should be 2 or more")

    @cache
    def tokenizer() -> Any:
        return read_tokenizer(args.model, args.trust_remote_code)

    vocab_size = vocabulary(args.model)
    logs = [(path, read_log(path, tokenizer)) for path in args.files]
    for path, log in logs:
        highest = max(max(logged.prompt + logged.answer) for logged in log)
        if highest >= vocab_size:
            raise QuasarError(f"{path}: token {highest} is not one of {args.model}'s {vocab_size}")
    added = 0
    with CorpusStore(
        args.draft_store, tokenizer_fingerprint(tokenizer(), vocab_size), vocab_size, args.max_tokens
    ) as store:
        for _, log in logs:
            for logged in log:
                store.add([*logged.prompt, *logged.answer])
                added += len(logged.prompt) + len(logged.answer)
    files = f"{len(logs)} file" + "s" * (len(logs) > 1)
    print(f"{args.draft_store}: {added} tokens of {files} added")


def vocabulary(name: str) -> int:
    """How many tokens a model's embedding has."""
    from quasar.models.config import read_config
    from quasar.models.find import find_checkpoint

    return read_config(find_checkpoint(name)).vocab_size
