"""The distribution that tokens are sampled from. Drafters that sample use it as well as the target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from quasar.errors import QuasarError
from torch import Tensor

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
        few = _largest(logits, sampling.top_k + 1)
        floor = few.values[:, sampling.top_k - 1 : sampling.top_k]
        if _on_host(logits) and bool((few.values[:, sampling.top_k] < floor[:, 0]).all()):  # as many as asked for
            ordered, order = few.values[:, : sampling.top_k].softmax(dim=-1), few.indices[:, : sampling.top_k]
            return _spread(ordered if sampling.top_p == 1 else _nucleus(ordered, sampling.top_p), order, logits)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = _holding(probs, sampling.top_p)
        probs = _spread(_nucleus(ordered, sampling.top_p), order, probs)
    return probs


def _on_host(x: Tensor) -> bool:
    """Where a look at the numbers costs less than sorting a vocabulary; a device would have to be waited for."""
    return x.device.type == "cpu"


def _largest(x: Tensor, count: int) -> torch.return_types.topk:
    return x.topk(min(count, x.shape[-1]), dim=-1)


def _holding(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order and their tokens: at least those that together hold `mass`, mostly few."""
    if _on_host(probs):
        few = _largest(probs, _FEW)
        if bool((few.values[:, :-1].sum(dim=-1) >= mass).all()):
            return few.values, few.indices
    return probs.sort(dim=-1, descending=True)


def _nucleus(ordered: Tensor, mass: float) -> Tensor:
    """Top-p of probabilities in descending order: a token goes when those before it already hold `mass`; the first
    always stays. Normalised."""
    ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= mass, 0.0)
    return ordered / ordered.sum(dim=-1, keepdim=True)


def _spread(ordered: Tensor, order: Tensor, like: Tensor) -> Tensor:
    """Back over the whole vocabulary, zero elsewhere."""
    return torch.zeros_like(like).scatter_(-1, order, ordered)


def sample_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of [rows, vocab] (need not be normalised) by uniform numbers [rows] in [0, 1)."""
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    # The first index whose cdf exceeds u * total: a token of probability 0 never is. Where u * total rounds up to the
    # total, the last token that is possible.
    chosen = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    return torch.minimum(chosen, torch.searchsorted(cdf, total))[:, 0]
