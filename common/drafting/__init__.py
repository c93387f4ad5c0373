"""Drafters by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quasar.backends.base import KVCache
from quasar.drafting.ngram import NGramDrafter
from quasar.drafting.suffix import SuffixDrafter, open_store
from quasar.errors import QuasarError
from quasar.speculation.draft import Drafter
from quasar.speculation.sampling import Sampling

if TYPE_CHECKING:
    from quasar.models.model import Model

_DRAFTERS: dict[str, type[Drafter] | None] = {"none": None, "ngram": NGramDrafter, "suffix": SuffixDrafter}
DRAFTS = (*_DRAFTERS, "suffix:FILE", "self:w4a4", "self:skip=K", "model:PATH")


@dataclass(frozen=True)
class DraftTarget:
    """What a drafter may use of the sequence it drafts for: the model and KV cache that verify, and how it samples."""

    model: Model
    cache: KVCache
    sampling: Sampling | None  # None is greedy


def check_draft(name: str) -> None:
    """Raises QuasarError unless the name is one of DRAFTS; what a model cannot do shows in `new_drafter`."""
    kind, _, value = name.partition(":")
    if kind == "self" and value.startswith("skip="):
        if not value.removeprefix("skip=").isdecimal():
            raise QuasarError(f"--draft {name}: K in self:skip=K is a number of layers")
    elif name not in _DRAFTERS and name != "self:w4a4" and not (kind in ("suffix", "model") and value):
        raise QuasarError(f"--draft {name} is unknown; use one of {', '.join(DRAFTS)}")


def new_drafter(name: str, target: DraftTarget) -> Drafter | None:
    """A fresh drafter for one sequence; None for "none".

    Raises QuasarError on an unknown name, or one that the target model cannot be drafted for by.
    """
    check_draft(name)
    if name in _DRAFTERS:
        made = _DRAFTERS[name]
        return None if made is None else made()
    kind, _, value = name.partition(":")
    if kind == "suffix":
        return SuffixDrafter(open_store(value, target.model))
    # Models import calibration and tokenizers: only where a model drafts.
    from quasar.drafting.decoder import ModelDrafter, SelfDrafter
    from quasar.drafting.draft_models import draft_decoder

    decoder = draft_decoder(target.model, name)
    if kind == "self":
        return SelfDrafter(decoder, target.cache, target.sampling)
    capacity = min(target.cache.capacity, decoder.config.max_position_embeddings)
    return ModelDrafter(decoder, decoder.new_cache(capacity), target.sampling)
