"""Files that people write, as text and as JSON: whatever is wrong with one is an error that callers expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quasar.errors import QuasarError, shorten


def read_text(path: Path, name: str = "") -> str:
    """A file's text, without a byte-order mark. Raises QuasarError with `name` (else the path) where it has none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise QuasarError(f"{name or path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuasarError(f"{name or path}: cannot be read as text ({shorten(str(error))})") from None


def read_lines(path: Path, name: str = "") -> list[str]:
    """The lines of a JSONL file. A text inside may hold what other conventions take for the end of a line (U+2028)."""
    text = read_text(path, name)
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(text: str) -> Any:
    """What JSON says. Raises ValueError where it is none, and where it is nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: one with half a surrogate pair cannot, which stands for a byte that is
    not UTF-8, or comes from such a JSON escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
