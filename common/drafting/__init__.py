"""Drafters by name."""

from __future__ import annotations

from common.drafting.base import Drafter
from common.drafting.ngram import NGramDrafter
from common.errors import QuasarError

_DRAFTERS: dict[str, type[Drafter] | None] = {"none": None, "ngram": NGramDrafter}
DRAFTS = tuple(_DRAFTERS)


def new_drafter(name: str) -> Drafter | None:
    """A fresh drafter for one sequence; None for "none". Raises QuasarError on an unknown name."""
    if name not in _DRAFTERS:
        raise QuasarError(f"--draft {name} is unknown; use one of {', '.join(DRAFTS)}")
    made = _DRAFTERS[name]
    return None if made is None else made()
