"""The cascade: output of full precision at nearly the quantised model's cost.

Seen from the full-precision verifier, speculative decoding in W8A8 is one more drafter: it proposes a block of tokens,
and one pass in full precision verifies them all. Both sample with the same noise, so sampled blocks agree as greedy
ones do. The block's length follows the rule for rows as every draft's does: where it does not pay, full precision
verifies the drafts of the quantised model's drafter itself, or decoding is plain.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from quasar.backends.base import Slot
from quasar.drafting.decoder_drafter import PREFILL_FROM, FollowedText
from quasar.drafting.survival import SurvivalTable
from quasar.models.runtime import PROMPT_ROWS, Runtime
from quasar.speculation.choice import TokenChooser
from quasar.speculation.draft import Draft, Drafter, TopRow
from quasar.speculation.rows import RowRule
from quasar.speculation.sampling import Sampling
from quasar.speculation.verifier import Verifier, Window

_FIRST_BLOCKS = 2  # whose time says little: passes run for the first time
_FADING = 0.9  # of what earlier blocks took, with each
_DOUBT = 4.0  # candidates that the first expectation weighs
_LONGEST_INNER = 15  # candidates of the inner drafter in one pass of the quantised model


class CascadeDrafter(Drafter):
    """Drafts by speculative decoding with a quantised model, over a slot of its own."""

    takes_passes = True

    def __init__(
        self, runtime: Runtime, slot: Slot, drafter: Drafter | None, sampling: Sampling | None, gamma: int | None
    ) -> None:
        """drafter and gamma: those of the quantised model; sampling: the target's, None for greedy."""
        self._runtime, self._sampling, self._gamma = runtime, sampling, gamma
        self._drafter, self._verifier = drafter, Verifier(runtime)
        self._rule = RowRule(runtime.backend.captures_rows)
        self._followed = FollowedText(slot)
        self._tokens: list[int] = []
        self._prompt_tokens = 0
        self._survival = SurvivalTable(lambda source, match, depth: 0.95)
        self._own_passes = 0
        self._was_free = False  # whether the latest draft took no passes
        self._trust = 1.0  # that survival is multiplied by
        self._expected = self._right = 0.0  # candidates of the latest blocks that survive
        self._seconds = self._blocks = self._block_tokens = 0.0  # of drafting, the latest blocks above all

    def extend(self, tokens: Sequence[int]) -> None:
        if not self._tokens:
            self._prompt_tokens = len(tokens)
        self._tokens.extend(tokens)
        if self._drafter is not None:
            self._drafter.extend(tokens)
        if len(self._tokens) == self._prompt_tokens:  # now rather than in the first draft
            self._catch_up()

    def _catch_up(self) -> None:
        """Takes the text into the slot, where it is more than a pass may take beside its draft."""
        uncached = self._followed.uncached(self._tokens, ())[:-1]
        if len(uncached) >= PREFILL_FROM:
            with self._runtime.lock:
                self._runtime.prefill(self._followed.slot, uncached, logits_to_keep=0)
            self._followed.held += uncached
            self._own_passes += -(-len(uncached) // PROMPT_ROWS)

    @property
    def top_k(self) -> int:  # type: ignore[override]
        """What the quantised model's drafter wants to know."""
        return 0 if self._drafter is None else self._drafter.top_k

    def propose_free(self, most: int, least: float = 0.0) -> Draft:
        """The quantised model's drafter may as well draft for full precision."""
        self._was_free = self._drafter is not None and not self._drafter.takes_passes
        return self._drafter.propose(most, (), least) if self._drafter is not None and self._was_free else Draft()

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        begin = time.perf_counter()
        draft = self._propose_block(self._rule.filled(1 + most) - 1, pending)
        self._blocks += 1
        if self._blocks > _FIRST_BLOCKS:
            self._seconds = _FADING * self._seconds + time.perf_counter() - begin
            self._block_tokens = _FADING * self._block_tokens + len(draft)
        return draft

    def _propose_block(self, most: int, pending: Sequence[int]) -> Draft:
        self._was_free = False
        self._catch_up()
        tokens: list[int] = []
        while len(tokens) < most:
            ahead = [*pending, *tokens]
            uncached = self._followed.uncached(self._tokens, ahead)
            room = min(most - len(tokens) - 1, self._followed.slot.free - len(uncached))
            if room < 0:
                break
            proposed, count = self._inner_draft(room, ahead, len(uncached))
            chooser = TokenChooser(self._sampling)
            chooser.index = len(self._tokens) + len(ahead) - self._prompt_tokens
            window = Window(self._followed.slot, uncached, chooser, proposed.first(count), self.top_k)
            with self._runtime.lock:
                costs, begin = self._runtime.costs, time.perf_counter()
                verdict = self._verifier.step([window])[0]
                if self._runtime.settled:
                    costs.learn(len(uncached) + count, time.perf_counter() - begin)
            if self._drafter is not None:
                self._drafter.observe(proposed, count, verdict.own, verdict.top)
            self._own_passes += 1
            self._followed.held += [*uncached, *verdict.tokens[:-1]]
            tokens += verdict.tokens
        survival, keys = self._survival.chain("cascade", 0, len(tokens))
        return Draft.chain(tokens, [self._trust * s for s in survival], keys)

    def _inner_draft(self, room: int, ahead: Sequence[int], rows: int) -> tuple[Draft, int]:
        """What the quantised model's drafter proposes, and how many of its candidates to verify."""
        if self._drafter is None or room < 1:
            return Draft(), 0
        costs = self._runtime.costs
        least = 0.0 if self._gamma else self._rule.least(1, rows, costs)
        draft = self._drafter.propose(min(self._gamma or _LONGEST_INNER, room), ahead, least)
        if self._gamma is not None or not draft.tokens:
            return draft, len(draft)
        return draft, self._rule.candidates([draft], rows, costs)[0]

    def expected_survival(self, most: int) -> list[float]:
        return [self._trust * s for s in self._survival.chain("cascade", 0, most)[0]]

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        if self._was_free and self._drafter is not None:
            self._drafter.observe(draft, verified, own, top)
        elif draft.tokens:
            self._survival.learn(draft.outcomes(verified, own))
            # Text is easy in places: where candidates agree they agree at length, and their survival is overrated.
            self._expected = _FADING * self._expected + sum(draft.survival[:verified]) / self._trust
            self._right = _FADING * self._right + len(draft.accepted(verified, own))
            self._trust = min((self._right + _DOUBT) / (self._expected + _DOUBT), 1.0)

    def seconds_per_token(self) -> float:
        """Of drafting; at first a guess: passes of four rows bring 1.5 tokens."""
        if self._block_tokens:
            return self._seconds / self._block_tokens
        return self._runtime.costs(1) if self._drafter is None else self._runtime.costs(4) / 1.5

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Of the quantised model and of its drafter."""
        return self._own_passes + (self._drafter.passes if self._drafter is not None else 0)

    @property
    def weight_bytes(self) -> int:  # type: ignore[override]
        inner = self._drafter.weight_bytes if self._drafter is not None else 0
        return self._own_passes * self._runtime.decoder.weight_bytes_per_pass + inner

    def finish(self) -> None:
        if self._drafter is not None:
            self._drafter.finish()
