"""The drafters that take no passes and no model, by name."""

from __future__ import annotations

from collections.abc import Callable

from quasar.drafting.evidence import RUNNERS_UP
from quasar.drafting.hybrid import HybridDrafter
from quasar.drafting.memory import DraftMemory
from quasar.drafting.ngram import NGramDrafter
from quasar.drafting.suffix import SuffixDrafter
from quasar.errors import QuasarError
from quasar.speculation.draft import Drafter

_MADE: dict[str, Callable[[DraftMemory, int], Drafter | None]] = {
    "none": lambda memory, top_k: None,
    "ngram": lambda memory, top_k: NGramDrafter(),
    "suffix": lambda memory, top_k: SuffixDrafter(),
    "hybrid": lambda memory, top_k: HybridDrafter(memory, top_k=top_k),
    "text": lambda memory, top_k: HybridDrafter(memory, corpus=False),
    "corpus": lambda memory, top_k: HybridDrafter(memory, text=False),
    "recycling": lambda memory, top_k: HybridDrafter(memory, text=False, corpus=False, top_k=top_k),
}
FREE_DRAFTS = tuple(_MADE)


def new_free_drafter(name: str, memory: DraftMemory, recycles: bool = True) -> Drafter | None:
    """A fresh drafter for one sequence; None for "none".

    memory: what it shares with other sequences; recycles: whether the verifier's best successors are to be had.
    """
    if name not in _MADE:
        raise QuasarError(f"--draft {name}: needs a model; drafters without one are {', '.join(FREE_DRAFTS)}")
    return _MADE[name](memory, RUNNERS_UP if recycles else 0)
