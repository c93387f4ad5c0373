"""Acceptance rules: which drafted tokens the target would have said itself, and what it says next.

A rule takes the logits of a window, float32 [drafted + 1, vocab], row i being the target's opinion of what follows
the last committed token and the first i drafted ones. It returns the tokens to commit: the accepted prefix of the
draft and one token of the target's own. Each rule copies once from device to host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from common.drafting.base import Draft
from common.errors import QuasarError


class Acceptance(ABC):
    @abstractmethod
    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        """Tokens to commit, 1 to drafted + 1; `position` is the output index of the first of them."""


class GreedyAcceptance(Acceptance):
    """Keeps the longest prefix of the draft that equals the target's argmax, then the target's next token."""

    def __call__(self, logits: Tensor, draft: Draft, position: int) -> list[int]:
        return _until_mismatch(logits.argmax(dim=-1).tolist(), draft.tokens)


@dataclass(frozen=True)
class Sampling:
    """temperature > 0; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise QuasarError(f"temperature is {self.temperature}; sampling needs a number above 0 (0 is greedy)")
        if self.top_k < 0:
            raise QuasarError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise QuasarError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


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
        probs = target_distribution(logits, self._sampling)
        uniforms = self._uniforms_at(position, len(probs)).to(probs.device)
        if draft.probs is None:
            return _until_mismatch(sample_inverse_cdf(probs, uniforms[:, 0]).tolist(), draft.tokens)
        return rejection_sample(probs, draft.tokens, draft.probs, uniforms)

    def _uniforms_at(self, position: int, count: int) -> Tensor:
        missing = position + count - len(self._uniforms)
        if missing > 0:
            more = torch.rand(max(missing, 256), 2, dtype=torch.float64, generator=self._generator)
            self._uniforms = torch.cat([self._uniforms, more])
        return self._uniforms[position : position + count]


def target_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """float32 [rows, vocab] -> float64 probabilities: temperature, then top-k, then top-p, in transformers' order."""
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # A token goes when those before it already hold top_p; the first always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of [rows, vocab] (need not be normalised) by uniform numbers [rows] in [0, 1)."""
    cdf = probs.cumsum(dim=-1)
    # The first index whose cdf exceeds u * total: a token of probability 0 never is.
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


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
