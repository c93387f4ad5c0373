"""One process at a time, where the system has such locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quasar.errors import QuasarError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None


def lock(file: int | IO[Any], refusal: str) -> None:
    """Locks an open file until it is closed. Raises QuasarError(refusal) while another holder has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise QuasarError(refusal) from None


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Holds a folder's lock; raises as `lock` does."""
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        lock(opened, refusal)
        yield
    finally:
        os.close(opened)
