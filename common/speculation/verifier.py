"""The verifier: one forward pass of the target over [last token + draft], one acceptance rule, one commit."""

from __future__ import annotations

from collections.abc import Sequence

from quasar.backends.base import KVCache
from quasar.models.decoder import Decoder
from quasar.speculation.acceptance import Acceptance
from quasar.speculation.draft import Draft
from torch import Tensor


class Verifier:
    """The target's state of one sequence: a KV cache that holds everything committed but the last token."""

    def __init__(self, decoder: Decoder, cache: KVCache, acceptance: Acceptance) -> None:
        self._decoder, self._cache, self._acceptance = decoder, cache, acceptance
        self._window_pass = decoder.backend.window_pass(decoder, cache)
        self.passes = 0
        self.logits: Tensor | None = None  # [drafted + 1, vocab] of the latest step

    def start(self, prompt: Sequence[int]) -> int:
        """Reads the prompt; returns the first token of the output."""
        logits = self._decoder.prefill(prompt, self._cache, keep=1)
        return self._acceptance(logits, Draft(), 0)[0]

    def step(self, behind: Sequence[int], draft: Draft, position: int) -> list[int]:
        """Verifies `draft` behind the committed tokens that the cache does not hold yet, mostly just the last one;
        returns the 1 to len(draft) + 1 tokens it commits.

        `position` is the output index of the first of them.
        """
        self.logits = self._window_pass([*behind, *draft.tokens], len(draft.tokens) + 1)
        tokens = self._acceptance(self.logits, draft, position)
        # `behind` and the accepted draft; the target's own last token is not in yet.
        self._cache.commit(len(behind) + len(tokens) - 1)
        self.passes += 1
        return tokens

    @property
    def room(self) -> int:
        """The longest draft that the cache still holds behind the last token."""
        return self._cache.free - 1
