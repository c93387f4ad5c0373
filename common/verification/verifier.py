"""The verifier: one forward pass of the target over [last token + draft], one acceptance rule, one commit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.backends.base import KVCache
from common.drafting.base import Draft
from common.models.decoder import Decoder
from common.verification.acceptance import Acceptance


class Verifier:
    """The target's state of one sequence: a KV cache that holds everything committed but the last token."""

    def __init__(self, decoder: Decoder, cache: KVCache, acceptance: Acceptance) -> None:
        self._decoder, self._cache, self._acceptance = decoder, cache, acceptance
        self.passes = 0

    def start(self, prompt: Sequence[int]) -> int:
        """Reads the prompt; returns the first token of the output."""
        logits = self._decoder.prefill(prompt, self._cache, keep=1)
        return self._acceptance(logits, Draft(), 0)[0]

    def step(self, last: int, draft: Draft, position: int) -> list[int]:
        """Verifies `draft` behind the committed token `last`; returns the 1 to len(draft) + 1 tokens it commits.

        `position` is the output index of the first of them.
        """
        window = torch.tensor([last, *draft.tokens], device=self._decoder.backend.device)
        logits = self._decoder(window, self._cache, keep=len(window))
        tokens = self._acceptance(logits, draft, position)
        self._cache.commit(len(tokens))  # `last` and the accepted draft; the target's own last token is not in yet
        self.passes += 1
        return tokens

    @property
    def room(self) -> int:
        """The longest draft that the cache still holds behind the last token."""
        return self._cache.free - 1
