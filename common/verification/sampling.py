"""The distribution that tokens are sampled from. Drafters that sample use it as well as the target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import QuasarError

_FEW = 256  # tokens that mostly hold top_p


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

    def independent(self, stream: int) -> Sampling:
        """The same distribution with random numbers of its own: 0 is the verifier's, each drafter takes another."""
        return replace(self, seed=(self.seed + stream * 0x9E3779B97F4A7C15) % 2**63)


def target_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """float32 [rows, vocab] -> probabilities: temperature, then top-k, then top-p, in transformers' order.

    In float64, which an Ascend NPU does not have: there in float32, where a rounded cdf moves the boundary between two
    tokens by less than 1e-5.
    """
    logits = (logits if logits.device.type == "npu" else logits.double()) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = _largest(probs, sampling.top_p)
        # A token goes when those before it already hold top_p; the first always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def _largest(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The largest of each row and their indices, in descending order: at least those that together hold `mass`."""
    # Mostly a few do. Sorting a vocabulary takes the host as long as a pass; a device would have to be waited for.
    if probs.device.type == "cpu" and probs.shape[-1] > _FEW:
        few = probs.topk(_FEW, dim=-1)
        if bool((few.values[:, :-1].sum(dim=-1) >= mass).all()):
            return few.values, few.indices
    return probs.sort(dim=-1, descending=True)


def sample_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of [rows, vocab] (need not be normalised) by uniform numbers [rows] in [0, 1)."""
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    # The first index whose cdf exceeds u * total: a token of probability 0 never is. Where u * total rounds up to the
    # total, the last token that is possible.
    chosen = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    return torch.minimum(chosen, torch.searchsorted(cdf, total))[:, 0]
