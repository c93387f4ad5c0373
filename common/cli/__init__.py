"""The `quasar` command: one module per subcommand, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from quasar.cli import streams
from quasar.errors import QuasarError, shorten
from quasar.memory import out_of_memory_in_one_line

_EPILOG = """examples:
  quasar generate "def main():"                              the shipped model, W8A8, hybrid drafts
  quasar generate --model Qwen/Qwen3-0.6B --chat "Why is the sky blue?"
  quasar compare "class Stack:"                              plain, n-gram, W8A8 and Quasar side by side
"""


class OneLineParser(argparse.ArgumentParser):
    """Bad flags get one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from quasar.cli import batch, bench, cache, chat, compare, corpus, eval, generate, inspect, quantize, serve

    parser = OneLineParser(
        prog="quasar",
        description="Self-speculative decoding: free drafts, verified in one W8A8 pass of the same model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, chat, serve, batch, compare, quantize, inspect, cache, corpus, eval, bench):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None, default_device: str | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for what the user can put right, 130 when interrupted.

    default_device replaces "auto" where the command line names no device.
    """
    streams.prepare()
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    try:
        streams.check_arguments(argv)
    except QuasarError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    if default_device is not None and getattr(args, "device", None) == "auto":
        args.device = default_device
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(getattr(args, "verbose", 0), 2)]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        with out_of_memory_in_one_line():
            code = args.run(args)
        sys.stdout.flush()
    except QuasarError as error:
        print(f"quasar {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; keep the interpreter's own flush at exit quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path of a flag that nothing else looked at: too long a name, no permission
        if error.filename is None:
            raise
        print(f"quasar {args.command}: {shorten(str(error.filename))}: {error.strerror}", file=sys.stderr)
        return 2
    return code or 0
