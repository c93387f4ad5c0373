"""Standard input and output as text, whatever the terminal's encoding."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from quasar.errors import QuasarError, shorten
from quasar.reading import is_text


def prepare() -> None:
    """Bytes of standard input that are no text become an error, characters that an output cannot show escapes."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # it was read already, by whoever called
                stream.reconfigure(errors=errors)


def check_arguments(argv: Sequence[str]) -> None:
    """Raises QuasarError for one that is not text in the terminal's encoding."""
    for argument in argv:
        if not is_text(argument):
            raise QuasarError(f"argument {shorten(ascii(argument))} holds bytes that are not UTF-8")


def read_all() -> str:
    """Standard input, without a byte-order mark."""
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _no_text(error) from None


def read_line() -> str:
    """A line of standard input, without its end. EOFError where there is none."""
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise _no_text(error) from None
    if not line:
        raise EOFError
    return line.rstrip("\n").removeprefix("\ufeff")


def print_json(value: Any) -> None:
    """One object on a line; characters that the output cannot show as JSON's own escapes."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def _no_text(error: UnicodeDecodeError) -> QuasarError:
    return QuasarError(f"standard input: cannot be read as text ({error})")
