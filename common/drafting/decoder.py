"""Drafting with a decoder, token by token: the target in lower precision or with fewer layers, or a smaller model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from quasar.backends.base import KVCache
from quasar.drafting.costs import pass_costs
from quasar.models.decoder import PREFILL_CHUNK, Decoder
from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.sampling import Sampling, sample_inverse_cdf, target_distribution
from torch import Tensor

PREFILL_FROM = 16  # tokens: fewer may wait for the next pass


class DecoderDrafter(Drafter):
    """Greedy drafts are point masses; sampled ones come with the distributions they were drawn from."""

    takes_passes = True

    def __init__(self, decoder: Decoder, cache: KVCache, sampling: Sampling | None) -> None:
        """sampling: the target's, None for greedy."""
        self._decoder, self._cache, self._sampling = decoder, cache, sampling
        self._window_pass = decoder.backend.window_pass(decoder, cache)
        self._tokens: list[int] = []
        # Of its own: acceptance must not depend on the numbers that the draft was drawn with.
        self._generator = torch.Generator()
        if sampling is not None:
            self._generator.manual_seed(sampling.independent(1).seed)

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)

    @abstractmethod
    def _behind(self, pending: Sequence[int]) -> list[int]:
        """The text's tokens that the cache does not hold, at least the last."""

    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        behind = self._behind(pending)
        tokens: list[int] = []
        probs: list[Tensor] = []
        for _ in range(min(gamma, self._cache.free - len(behind) + 1)):
            logits = self._run(behind, keep=1)
            if self._sampling is None:
                token = int(self._decoder.backend.argmax(logits))
            else:
                probs.append(target_distribution(logits, self._sampling))
                uniform = torch.rand(1, dtype=torch.float64, generator=self._generator)
                token = int(sample_inverse_cdf(probs[-1], uniform.to(probs[-1].dtype).to(logits.device)))
            tokens.append(token)
            behind = [token]
        return Draft(tokens, torch.cat(probs) if probs else None)

    def seconds_per_token(self) -> float:
        return pass_costs(self._decoder)(1)

    def _run(self, ids: Sequence[int], keep: int) -> Tensor:
        passes = -(-len(ids) // PREFILL_CHUNK)
        self.passes += passes
        self.weight_bytes += passes * self._decoder.weight_bytes_per_pass
        if len(ids) >= PREFILL_FROM:
            return self._decoder.prefill(ids, self._cache, keep)
        logits = self._window_pass(ids, keep)
        self._cache.commit(len(ids))
        return logits


class SelfDrafter(DecoderDrafter):
    """Shares the verifier's weights and its KV cache (QSpec, arXiv 2410.11305).

    It reads what the verifier wrote, adds its own entries behind, and gives the cache back as it was: the verification
    pass runs over the same positions and overwrites them. No second cache, no second weights.
    """

    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        committed = self._cache.length
        draft = super().propose(gamma, pending)
        self._cache.rewind(committed)
        return draft

    def _behind(self, pending: Sequence[int]) -> list[int]:
        known, held = len(self._tokens), self._cache.length
        return [*self._tokens[held:], *pending[max(held - known, 0) :]]


class ModelDrafter(DecoderDrafter):
    """A smaller model with its own KV cache, which keeps those drafted tokens that were accepted."""

    def __init__(self, decoder: Decoder, cache: KVCache, sampling: Sampling | None) -> None:
        super().__init__(decoder, cache, sampling)
        self._followed = FollowedText(cache)

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        behind = self._behind(())[:-1]
        if PREFILL_FROM <= len(behind) <= self._cache.free:
            self._run(behind, keep=0)  # a prompt, now rather than in the first draft

    def _behind(self, pending: Sequence[int]) -> list[int]:
        return self._followed.behind(self._tokens, pending)

    def _run(self, ids: Sequence[int], keep: int) -> Tensor:
        self._followed.held.extend(ids)
        return super()._run(ids, keep)


class FollowedText:
    """Which tokens a KV cache holds, for a cache that runs ahead of the committed text and may have to turn back."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.held: list[int] = []  # as many as the cache is long; whoever runs the decoder adds to it
        self._certain = 0  # so many of them are committed and known to be right

    def behind(self, committed: Sequence[int], pending: Sequence[int]) -> list[int]:
        """Rewinds the cache to where it agrees with the text; returns the tokens it lacks, at least the last."""
        text = [*committed, *pending]
        limit = min(len(self.held), len(text) - 1)
        agreed = min(self._certain, limit)
        while agreed < limit and self.held[agreed] == text[agreed]:
            agreed += 1
        self._certain = min(agreed, len(committed))
        self.cache.rewind(agreed)
        del self.held[agreed:]
        return text[agreed:]
