"""What a change to the weights did to the model: its distributions before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.models.decoder import Decoder

_KEPT_BYTES = 512 << 20  # of full-precision log-probabilities held for the comparison
_SEQUENCE = 512  # tokens


@dataclass(frozen=True)
class Fidelity:
    """Against full precision, over `tokens` held-out positions."""

    tokens: int
    mean_kl: float  # nats, KL(full || quantised)
    top1_agreement: float  # 0 to 1
    perplexity_full: float
    perplexity: float
    p99_kl: float  # 99 % of positions diverge less

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.2e} nats, top-1 agreement {self.top1_agreement:.2%}, perplexity "
            f"{self.perplexity:.3f} (full precision {self.perplexity_full:.3f}), {self.tokens} held-out tokens"
        )


class FidelityProbe:
    """Records a decoder's log-probabilities, and compares them with those of the same decoder changed."""

    def __init__(self, decoder: Decoder, sequences: Sequence[Sequence[int]], tokens: int = 4096) -> None:
        """Takes as many leading tokens of each sequence as make up `tokens` and fit the memory meant for it."""
        budget = min(tokens, _KEPT_BYTES // (4 * decoder.config.vocab_size))
        limit = min(_SEQUENCE, decoder.config.max_position_embeddings)
        self._sequences: list[list[int]] = []
        for ids in sequences:
            kept = list(ids[: min(limit, budget + 1)])
            if len(kept) > 1:
                self._sequences.append(kept)
                budget -= len(kept) - 1
            if budget <= 0:
                break
        if not self._sequences:
            raise ValueError("fidelity needs a sequence of at least two tokens")
        self._before = [_log_probs(decoder, ids) for ids in self._sequences]

    def compare(self, decoder: Decoder) -> Fidelity:
        """The figures for the decoder as it is now."""
        agree, loss, loss_full = 0, 0.0, 0.0
        divergences = []
        for ids, before in zip(self._sequences, self._before, strict=True):
            after = _log_probs(decoder, ids)
            divergences.append((before.exp() * (before - after)).sum(dim=-1))
            agree += (before.argmax(-1) == after.argmax(-1)).sum().item()
            following = torch.tensor(ids[1:], device=after.device)[:, None]
            loss -= after.gather(1, following).sum().item()
            loss_full -= before.gather(1, following).sum().item()
        kl = torch.cat(divergences)
        count = len(kl)
        perplexity, perplexity_full = (torch.tensor(total / count).exp().item() for total in (loss, loss_full))
        p99 = kl.quantile(0.99).item()
        return Fidelity(count, kl.double().mean().item(), agree / count, perplexity_full, perplexity, p99)


def _log_probs(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    """float32 [len(ids) - 1, vocab]: what is predicted after each token but the last."""
    inputs = ids[:-1]
    return decoder.prefill(inputs, decoder.new_cache(len(inputs)), keep=len(inputs)).log_softmax(dim=-1)
