"""Drafters by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from quasar.backends.base import Slot
from quasar.drafting.cascade import CascadeDrafter
from quasar.drafting.decoder_drafter import ModelDrafter, SelfDrafter
from quasar.drafting.draft_models import draft_runtime
from quasar.drafting.free import FREE_DRAFTS, new_free_drafter
from quasar.drafting.memory import DraftMemory
from quasar.drafting.suffix import SuffixDrafter, open_store
from quasar.errors import QuasarError
from quasar.models.model import Model
from quasar.speculation.draft import Drafter
from quasar.speculation.sampling import Sampling

DEFAULT_DRAFT = "hybrid"
DRAFTS = (*FREE_DRAFTS, "suffix:FILE", "self:w4a4", "self:skip=K", "model:PATH")


@dataclass(frozen=True)
class DraftTarget:
    """What a drafter may use of the sequence it drafts for: the model and slot that verify, and how it samples."""

    model: Model
    slot: Slot
    sampling: Sampling | None  # None is greedy
    gamma: int | None = None
    lossless: bool = False  # the slot belongs to the full-precision decoder, and the quantised one drafts
    memory: DraftMemory | None = None  # what the sequences of an engine share; None: nothing


DrafterFactory = Callable[[DraftTarget], Drafter | None]


def check_draft(name: str) -> None:
    """Raises QuasarError unless the name is one of DRAFTS; what a model cannot do shows in `new_drafter`."""
    kind, _, value = name.partition(":")
    if kind == "self" and value.startswith("skip="):
        if not value.removeprefix("skip=").isdecimal():
            raise QuasarError(f"--draft {name}: K in self:skip=K is a number of layers")
    elif name not in FREE_DRAFTS and name != "self:w4a4" and not (kind in ("suffix", "model") and value):
        raise QuasarError(f"--draft {name} is unknown; use one of {', '.join(DRAFTS)}")


def new_drafter(name: str | DrafterFactory, target: DraftTarget) -> Drafter | None:
    """A fresh drafter for one sequence; None for "none" without a cascade.

    Raises QuasarError on an unknown name, or one that the target model cannot be drafted for by.
    """
    if target.lossless:
        runtime = target.model.runtime
        slot = runtime.new_slot(target.slot.capacity)
        inner = new_drafter(name, replace(target, slot=slot, lossless=False))
        return CascadeDrafter(runtime, slot, inner, target.sampling, target.gamma)
    if not isinstance(name, str):
        return name(target)
    check_draft(name)
    if name in FREE_DRAFTS:
        # Where they have their price, runners-up are for those who ask for nothing else.
        recycles = name == "recycling" or target.model.decoder.backend.cheap_top_k
        return new_free_drafter(name, target.memory or DraftMemory(), recycles)
    kind, _, value = name.partition(":")
    if kind == "suffix":
        return SuffixDrafter(open_store(value, target.model))
    runtime = draft_runtime(target.model, name)
    if kind == "self":
        return SelfDrafter(name, runtime, target.slot, target.sampling)
    capacity = min(target.slot.capacity, runtime.config.max_position_embeddings)
    return ModelDrafter("model", runtime, runtime.new_slot(capacity), target.sampling)
