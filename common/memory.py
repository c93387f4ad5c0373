"""Running out of device memory, said in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quasar.errors import QuasarError


def gigabytes(nbytes: int) -> str:
    """As in "1.50 GB"."""
    return f"{nbytes / 1e9:.2f} GB"


def host_memory() -> int:
    """Bytes of the host's memory that are free now, by what the system says it could give."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def out_of_memory_in_one_line() -> Iterator[None]:
    """Turns torch.OutOfMemoryError, whose message is a paragraph, into a QuasarError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuasarError(_one_line(str(error))) from None


def _one_line(message: str) -> str:
    """From torch's "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.1 GiB of which 1.5 GiB is free."."""
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    state = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", message)
    needed = f"{wanted[1]} more were needed" if wanted else "more was needed"
    free = f", {state[2]} of {state[1]} were free" if state else ""
    return (
        f"the device is out of memory: {needed}{free}; end what else runs on it, or take a shorter context, "
        "--precision w8a8 without --lossless, or a smaller model"
    )
