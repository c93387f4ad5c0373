"""Drafting with a decoder, token by token: the target in lower precision or with fewer layers, or a smaller model.

Sampled drafts are drawn with the target's own noise (speculation/sampling.py), so that the two agree as often as their
distributions let them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from quasar.backends.base import Batch, Segment, Slot
from quasar.drafting.survival import SurvivalTable
from quasar.models.runtime import PROMPT_ROWS, Runtime
from quasar.speculation.draft import Draft, Drafter, TopRow
from quasar.speculation.sampling import Sampling, own_token

PREFILL_FROM = 16  # tokens: fewer may wait for the next pass


class DecoderDrafter(Drafter):
    takes_passes = True

    def __init__(self, name: str, runtime: Runtime, slot: Slot, sampling: Sampling | None) -> None:
        """name: the source that its candidates are counted under; sampling: the target's, None for greedy."""
        self._name, self._runtime, self._slot, self._sampling = name, runtime, slot, sampling
        self._tokens: list[int] = []
        self._prompt_tokens = 0
        self._survival = SurvivalTable(lambda source, match, depth: 0.8)

    def extend(self, tokens: Sequence[int]) -> None:
        if not self._tokens:
            self._prompt_tokens = len(tokens)
        self._tokens.extend(tokens)

    @abstractmethod
    def _uncached(self, pending: Sequence[int]) -> list[int]:
        """The text's tokens that the slot does not hold, at least the last."""

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        uncached = self._uncached(pending)
        index = len(self._tokens) + len(pending) - self._prompt_tokens  # output index of the first candidate
        tokens: list[int] = []
        with self._runtime.lock:
            for _ in range(min(most, self._slot.free - len(uncached) + 1)):
                logits = self._run(uncached, logits_to_keep=1)
                if self._sampling is None:
                    token = int(self._runtime.backend.argmax(logits))
                else:
                    token = own_token(logits[0].cpu(), self._sampling, index + len(tokens))
                tokens.append(token)
                uncached = [token]
        return Draft.chain(tokens, *self._survival.chain(self._name, 0, len(tokens)))

    def expected_survival(self, most: int) -> list[float]:
        return self._survival.chain(self._name, 0, most)[0]

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        self._survival.learn(draft.outcomes(verified, own))

    def seconds_per_token(self) -> float:
        return self._runtime.costs(1)

    def _run(self, ids: Sequence[int], logits_to_keep: int) -> Tensor:
        passes = -(-len(ids) // PROMPT_ROWS)
        self.passes += passes
        self.weight_bytes += passes * self._runtime.decoder.weight_bytes_per_pass
        if len(ids) >= PREFILL_FROM:
            return self._runtime.prefill(self._slot, ids, logits_to_keep)
        logits = self._runtime.run(Batch([Segment(self._slot, list(ids), logits_to_keep=logits_to_keep)]))
        self._slot.commit(len(ids))
        return logits


class SelfDrafter(DecoderDrafter):
    """Shares the verifier's weights and its slot (QSpec, arXiv 2410.11305).

    It reads what the verifier wrote, adds its own entries behind, and gives the slot back as it was: the verification
    pass runs over the same positions and overwrites them. No second cache, no second weights.
    """

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        committed = self._slot.length
        try:
            return super().propose(most, pending)
        finally:
            self._slot.rewind(committed)

    def _uncached(self, pending: Sequence[int]) -> list[int]:
        known, held = len(self._tokens), self._slot.length
        return [*self._tokens[held:], *pending[max(held - known, 0) :]]


class ModelDrafter(DecoderDrafter):
    """A smaller model with a slot of its own, which keeps those drafted tokens that were accepted."""

    def __init__(self, name: str, runtime: Runtime, slot: Slot, sampling: Sampling | None) -> None:
        super().__init__(name, runtime, slot, sampling)
        self._followed = FollowedText(slot)

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        uncached = self._uncached(())[:-1]
        if PREFILL_FROM <= len(uncached) <= self._slot.free:
            with self._runtime.lock:
                self._run(uncached, logits_to_keep=0)  # a prompt, now rather than in the first draft

    def _uncached(self, pending: Sequence[int]) -> list[int]:
        return self._followed.uncached(self._tokens, pending)

    def _run(self, ids: Sequence[int], logits_to_keep: int) -> Tensor:
        self._followed.held.extend(ids)
        return super()._run(ids, logits_to_keep)


class FollowedText:
    """Which tokens a slot holds, for a slot that runs ahead of the committed text and may have to turn back."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.held: list[int] = []  # as many as the slot is long; whoever runs the decoder adds to it
        self._certain = 0  # so many of them are committed and known to be right

    def uncached(self, committed: Sequence[int], pending: Sequence[int]) -> list[int]:
        """Rewinds the slot to where it agrees with the text; returns the tokens it lacks, at least the last."""
        text = [*committed, *pending] if pending else committed
        limit = min(len(self.held), len(text) - 1)
        agreed = min(self._certain, limit)
        while agreed < limit and self.held[agreed] == text[agreed]:
            agreed += 1
        self._certain = min(agreed, len(committed))
        self.slot.rewind(agreed)
        del self.held[agreed:]
        return list(text[agreed:])
