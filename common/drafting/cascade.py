"""The cascade: output of full precision at nearly the quantised model's cost.

Seen from the full-precision verifier, speculative decoding in W8A8 is one more drafter: it proposes a block of tokens,
and one pass in full precision verifies them all. So the block is a window like any other, its size adapts to the
agreement of the two models as every window does, and acceptance is what it always is: greedy keeps the longest
agreeing prefix and corrects; sampling is rejection against the full-precision distribution with W8A8's as proposal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from quasar.backends.base import KVCache
from quasar.drafting.costs import pass_costs
from quasar.drafting.decoder import PREFILL_FROM, FollowedText
from quasar.models.decoder import PREFILL_CHUNK, Decoder
from quasar.speculation.acceptance import GreedyAcceptance, SamplingAcceptance
from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.sampling import Sampling, target_distribution
from quasar.speculation.speculator import Speculator
from quasar.speculation.verifier import Verifier
from quasar.speculation.window import Window
from torch import Tensor


class CascadeDrafter(Drafter):
    """Drafts by speculative decoding with a quantised model, over its own KV cache."""

    takes_passes = True

    def __init__(
        self, decoder: Decoder, cache: KVCache, drafter: Drafter | None, window: Window, sampling: Sampling | None
    ) -> None:
        """drafter and window: those of the quantised model; sampling: the target's, None for greedy."""
        self._decoder, self._followed, self._sampling = decoder, FollowedText(cache), sampling
        self._tokens: list[int] = []
        # Numbers of its own: whether full precision accepts must not depend on how the proposal was drawn.
        acceptance = (
            GreedyAcceptance(decoder.backend.argmax)
            if sampling is None
            else SamplingAcceptance(sampling.independent(2))
        )
        self._speculator = Speculator(Verifier(decoder, cache, acceptance), drafter, window)
        self._prefills = self._drawn = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        if self._speculator.drafter is not None:
            self._speculator.drafter.extend(tokens)
        behind = self._followed.behind(self._tokens, ())[:-1]
        if len(behind) >= PREFILL_FROM:  # a prompt, now rather than in the first draft
            self._decoder.prefill(behind, self._followed.cache, keep=0)
            self._followed.held += behind
            self._prefills += -(-len(behind) // PREFILL_CHUNK)

    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        gamma = min(gamma, self._followed.cache.free)
        tokens: list[int] = []
        probs: list[Tensor] = []
        while len(tokens) < gamma:
            ahead = [*pending, *tokens]
            behind = self._followed.behind(self._tokens, ahead)
            # Its uniforms are numbered as they are drawn, not by output index: a token that was taken back must
            # not lend its number to the one that comes instead.
            step = self._speculator.step(behind, self._drawn, gamma - len(tokens), ahead)
            self._drawn += len(step)
            self._followed.held += [*behind, *step[:-1]]
            if self._sampling is not None:
                probs.append(target_distribution(self._speculator.verifier.logits[: len(step)], self._sampling))
            tokens += step
        return Draft(tokens, torch.cat(probs) if probs else None)

    def seconds_per_token(self) -> float:
        drafted = 0 if self._speculator.drafter is None else 1
        return pass_costs(self._decoder)(drafted + 1) / (drafted + 1)  # a modest guess: every draft of one is right

    @property
    def passes(self) -> int:
        """Of the quantised model and of its drafter."""
        return self._prefills + self._speculator.verifier.passes + self._inner.passes

    @property
    def weight_bytes(self) -> int:
        own = (self._prefills + self._speculator.verifier.passes) * self._decoder.weight_bytes_per_pass
        return own + self._inner.weight_bytes

    @property
    def _inner(self) -> Drafter | type[Drafter]:
        return self._speculator.drafter or Drafter  # whose class attributes are the zeros of no drafter

    def finish(self) -> None:
        if self._speculator.drafter is not None:
            self._speculator.drafter.finish()
