"""`quasar eval replay`: the acceptance length of drafters on logs, without the model that wrote them."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

from quasar.cli import report
from quasar.drafting.free import FREE_DRAFTS, new_free_drafter
from quasar.drafting.memory import DraftMemory
from quasar.evaluation import replay

_MOST_ROWS = 256


def add_parser(kinds: Any) -> None:
    parser = kinds.add_parser(
        "replay",
        help="acceptance length of drafters on logs, without weights",
        description="Replays answers that some model gave greedily and counts the tokens that each drafter would have "
        'brought per pass. A file is JSONL of traces ({"prompt": [ids], "answer": [ids]}, or both as text), of OpenAI '
        "chats, or a .txt file; text needs --model for its tokenizer.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--draft",
        type=lambda text: text.split(","),
        default=["ngram", "hybrid"],
        metavar="D,D",
        help=f"some of {', '.join(FREE_DRAFTS)} (default: ngram,hybrid)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        default=[8],
        metavar="N,N",
        help="rows of a pass: the last token and N - 1 candidates (default: 8)",
    )
    parser.add_argument("--warm", action="store_true", help="let earlier requests of a file teach later ones")
    parser.add_argument("--model", metavar="M", help="whose tokenizer reads text")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the tokenizer brings")
    report.add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    for draft in args.draft:
        new_free_drafter(draft, DraftMemory())

    @cache
    def tokenizer() -> Any:
        return None if args.model is None else read_tokenizer(args.model, args.trust_remote_code)

    logs = [(path, replay.read_log(path, tokenizer)) for path in args.files]
    names = short_names(args.files)
    table = {
        (name, draft, rows): replay.replay(path, log, draft, rows, args.warm)
        for name, (path, log) in zip(names, logs, strict=True)
        for draft in args.draft
        for rows in args.rows
    }
    results = list(table.values())
    all_files = replay.together(results) if len(logs) > 1 else []
    kind = "warm: earlier requests of a file teach later ones" if args.warm else "cold: every request by itself"
    print(f"acceptance length (tokens per pass), {kind}\n")
    print("\n".join(_table(names, table, all_files, args.draft, args.rows)))
    figures = {"results": results, "together": all_files}
    report.write_json(args, {name: [result.as_dict() for result in some] for name, some in figures.items()})


def _table(
    names: list[str],
    table: dict[tuple[str, str, int], replay.Replayed],
    all_files: list[replay.Replayed],
    drafts: list[str],
    rows: list[int],
) -> list[str]:
    """Markdown, a line for each file and number of rows."""
    lines = [_line(["file", "rows", *drafts]), _line(["---"] * (len(drafts) + 2))]
    together = {("all together", r.draft, r.rows): r for r in all_files}
    for name in [*names, *(["all together"] if all_files else [])]:
        for n in rows:
            found = [(table | together)[name, draft, n] for draft in drafts]
            lines.append(_line([name, str(n), *(f"{result.acceptance_length:.2f}" for result in found)]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def short_names(paths: list[str]) -> list[str]:
    """File names without folders, where they stay different."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def read_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that need not be loaded."""
    from quasar.models.find import find_checkpoint
    from quasar.models.tokenizer import load_tokenizer

    return load_tokenizer(find_checkpoint(name, trust_remote_code), trust_remote_code)


def _rows(text: str) -> list[int]:
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or not all(1 <= n <= _MOST_ROWS for n in rows):
        raise argparse.ArgumentTypeError(f"{text} should be numbers of rows from 1 to {_MOST_ROWS}, as 6,8,16")
    return rows
