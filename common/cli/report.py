"""Files that figures are written to: looked at before the measurement, so that nothing is measured in vain."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from quasar.errors import QuasarError

_PICTURES = (".png", ".svg", ".pdf")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes the command's settings and figures to --json, whole or not at all; nothing where the flag is absent."""
    if args.json is None:
        return
    path = Path(args.json)
    beside = path.with_name(path.name + ".partial")
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        beside.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise QuasarError(f"--json {path}: cannot be written ({error})") from None


def file_to_write(text: str) -> str:
    """A flag's file. Raises ArgumentTypeError where none can be made."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} should name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: permission denied")
    return text


def picture_to_write(text: str) -> str:
    """A flag's picture. Raises ArgumentTypeError where none can be made."""
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} should end with {', '.join(_PICTURES)}")
    return file_to_write(text)
