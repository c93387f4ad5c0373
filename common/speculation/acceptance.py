"""Acceptance rules: which drafted tokens the target would have said itself, and what it says next.

A rule takes the logits of a window, float32 [drafted + 1, vocab], row i being the target's opinion of what follows
the last committed token and the first i drafted ones. It returns the tokens to commit: the accepted prefix of the
draft and one token of the target's own. Each rule copies once from device to host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from quasar.speculation.draft import Draft
from quasar.speculation.sampling import Sampling, sample_inverse_cdf, target_distribution
from torch import Tensor


class Acceptance(ABC):
    @abstractmethod
    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        """Tokens to commit, 1 to drafted + 1; `position` is the output index of the first of them."""


class GreedyAcceptance(Acceptance):
    """Keeps the longest prefix of the draft that equals the target's argmax, then the target's next token."""

    def __init__(self, argmax: Callable[[Tensor], Tensor]) -> None:
        """argmax: of each row of logits, the backend's own."""
        self._argmax = argmax

    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        return _until_mismatch(self._argmax(logits).tolist(), draft.tokens)


class SamplingAcceptance(Acceptance):
    """Speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): the output has exactly the
    target's distribution, whatever the drafter.

    Against a point-mass draft, accepting token d with probability p(d) and otherwise sampling from p without d is
    the same as sampling from p and accepting if d came out. It is done that way, with the uniform number that
    belongs to the token's output index: the same seed then gives the same text with and without speculation.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)  # on the host: the same on every device
        self._uniforms = torch.empty(0, 2, dtype=torch.float64)

    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        uniforms = self._uniforms_at(position, len(logits))
        if draft.probs is None:
            return self._sample_until_mismatch(logits, draft.tokens, uniforms[:, 0])
        probs = target_distribution(logits, self._sampling)
        return rejection_sample(probs, draft.tokens, draft.probs, uniforms.to(probs.dtype).to(probs.device))

    def _sample_until_mismatch(self, logits: Tensor, tokens: list[int], uniforms: Tensor) -> list[int]:
        # A distribution over a vocabulary costs the host much, and what follows a mismatch is not needed; a device
        # computes all of them before the host could look at the first.
        at_once = 1 if logits.device.type == "cpu" else len(logits)
        own: list[int] = []
        for rows, numbers in zip(logits.split(at_once), uniforms.split(at_once), strict=True):
            probs = target_distribution(rows, self._sampling)
            own += sample_inverse_cdf(probs, numbers.to(probs.dtype).to(probs.device)).tolist()
            if own != tokens[: len(own)]:
                break
        return _until_mismatch(own, tokens)

    def _uniforms_at(self, position: int, count: int) -> Tensor:
        missing = position + count - len(self._uniforms)
        if missing > 0:
            more = torch.rand(max(missing, 256), 2, dtype=torch.float64, generator=self._generator)
            self._uniforms = torch.cat([self._uniforms, more])
        return self._uniforms[position : position + count]


def rejection_sample(probs: Tensor, tokens: list[int], draft_probs: Tensor, uniforms: Tensor) -> list[int]:
    """Accepts token d with probability min(1, p(d) / q(d)), else samples from max(p - q, 0), normalised.

    probs [drafted + 1, vocab]; draft_probs q [drafted, vocab]; uniforms [drafted + 1, 2]: column 0 accepts, column 1
    samples.
    """
    drafted = torch.tensor(tokens, device=probs.device)
    rows = torch.arange(len(tokens), device=probs.device)
    q = draft_probs.to(probs.device, probs.dtype)
    accepted = uniforms[:-1, 0] * q[rows, drafted] < probs[rows, drafted]
    leftover = torch.cat([(probs[:-1] - q).clamp(min=0), probs[-1:]])
    corrections = sample_inverse_cdf(leftover, uniforms[:, 1])
    flags, own = torch.cat([accepted.long(), accepted.new_zeros(1).long()]), corrections
    host_flags, host_own = torch.stack([flags, own]).tolist()
    kept = host_flags.index(0)
    return [*tokens[:kept], host_own[kept]]


def _until_mismatch(own: list[int], tokens: list[int]) -> list[int]:
    """The target's own tokens up to and with the first that differs from the draft."""
    agreed = 0
    while agreed < len(tokens) and own[agreed] == tokens[agreed]:
        agreed += 1
    return own[: agreed + 1]
