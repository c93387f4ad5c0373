"""The distribution that tokens are sampled from, and the noise that samples them.

Sampling is the Gumbel-max trick with counted randomness: a token is the argmax of its log-probability plus noise that
is a function of (seed, output index, token id) alone. Text then depends on the seed and never on how it was computed,
and two models that use the same noise agree as often as a coupling of their distributions allows (Daliri et al. 2024,
arXiv 2408.07978: at least (1 - TV) / (1 + TV)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quasar.errors import QuasarError

_FEW = 256  # tokens that mostly hold top_p, and among which the sampled one mostly is
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    """temperature > 0; top_k 0, top_p 1 and min_p 0 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise QuasarError(f"temperature is {self.temperature}; sampling needs a number above 0 (0 is greedy)")
        if self.top_k < 0:
            raise QuasarError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise QuasarError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise QuasarError(f"min_p is {self.min_p}; it must lie between 0 and 1")


def gumbel(seed: int, index: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise [n] of the token ids [n] at an output index. Integers are hashed, on the host."""
    with np.errstate(divide="ignore"):  # u is never 0 or 1
        return -np.log(-np.log(_uniform(_hash(seed, index, tokens))))


def own_token(logits: Tensor, sampling: Sampling, index: int) -> int:
    """Samples a token from logits float32 [vocab], on the host, for the output index.

    Temperature, then top-k, then top-p and min-p, in transformers' order. Depends on nothing but its arguments.
    """
    values = logits.numpy()
    kept, values = _filtered(logits, values, sampling)
    scaled = values.astype(np.float64) / sampling.temperature
    if len(scaled) <= 4 * _FEW:
        ids = np.arange(len(scaled)) if kept is None else kept
        return int(ids[int(np.argmax(scaled + gumbel(sampling.seed, index, ids)))])
    return _argmax_of_many(scaled, kept, sampling.seed, index)


def _argmax_of_many(scaled: NDArray[np.float64], kept: NDArray[np.int64] | None, seed: int, index: int) -> int:
    """The argmax of scaled + noise over many tokens, with logarithms for those few that can be it."""
    ids = np.arange(len(scaled)) if kept is None else kept
    hashed = _hash(seed, index, ids)
    top = np.argpartition(scaled, -_FEW)[-_FEW:]
    best = float((scaled[top] - np.log(-np.log(_uniform(hashed[top])))).max())
    # Every other token has a score of at most `edge`, so it needs noise above best - edge, which few have.
    edge = float(scaled[top].min())
    needed = np.exp(-np.exp(-(best - edge)))
    possible = np.flatnonzero(_uniform(hashed) >= needed * (1 - 1e-12))
    possible = np.union1d(possible, top)
    score = scaled[possible] - np.log(-np.log(_uniform(hashed[possible])))
    return int(ids[possible[int(np.argmax(score))]])


def _filtered(
    logits: Tensor, values: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """The tokens that top-k, top-p and min-p leave, ascending (None: all of them), and their logits."""
    kept: NDArray[np.int64] | None = None
    if 0 < sampling.top_k < len(values):
        kept = np.flatnonzero(values >= logits.topk(sampling.top_k).values[-1].item())
        values = values[kept]
    if sampling.top_p < 1:
        inside = _nucleus(values, sampling)
        kept, values = inside if kept is None else kept[inside], values[inside]
    if sampling.min_p > 0:
        least = values.max() + sampling.temperature * np.log(sampling.min_p)
        inside = np.flatnonzero(values >= least)
        kept, values = inside if kept is None else kept[inside], values[inside]
    return kept, values


def _nucleus(values: NDArray[np.float32], sampling: Sampling) -> NDArray[np.int64]:
    """Top-p: a token goes when those before it already hold the mass; the most probable always stays. Ascending."""
    weights = np.exp((values - values.max()) / np.float32(sampling.temperature))
    mass = sampling.top_p * float(weights.sum(dtype=np.float64))
    candidates = np.arange(len(values))
    if len(values) > 4 * _FEW:
        few = np.flatnonzero(values >= np.partition(values, -_FEW)[-_FEW])
        if float(weights[few].sum(dtype=np.float64)) >= mass:
            candidates = few
    order = candidates[np.argsort(-values[candidates], kind="stable")]
    ordered = weights[order].astype(np.float64)
    before = np.cumsum(ordered) - ordered
    return np.sort(order[(before < mass) | (np.arange(len(order)) == 0)])


def _hash(seed: int, index: int, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 well mixed bits of each (seed, index, token): the finaliser of splitmix64 (Steele et al. 2014), chained."""
    x = tokens.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(noise_state(seed, index))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def noise_state(seed: int, index: int) -> int:
    """64 bits of a seed and an output index, from which a device hashes each token's noise."""
    state = _GOLDEN  # not 0, which would mix to itself
    while True:  # a seed of any size
        state = _mix(state ^ (seed & _MASK))
        seed >>= 64
        if seed in (0, -1):  # what is left is the sign
            break
    state ^= seed & _MASK
    return _mix((state + index * _GOLDEN) & _MASK)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _uniform(hashed: NDArray[np.uint64]) -> NDArray[np.float64]:
    """52 bits, in the middle of their interval: never 0 and never 1."""
    return ((hashed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits float32 [vocab] -> the probabilities float64 [vocab] that `own_token` samples from."""
    kept, values = _filtered(logits, logits.numpy(), sampling)
    probs = torch.zeros(len(logits), dtype=torch.float64)
    scaled = torch.from_numpy(values.astype(np.float64) / sampling.temperature).softmax(dim=0)
    probs[torch.arange(len(logits)) if kept is None else torch.from_numpy(kept)] = scaled
    return probs
