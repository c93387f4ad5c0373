"""What a change to the weights did to the model: its distributions before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quasar.errors import QuasarError
from quasar.models.decoder import Decoder
from quasar.models.fidelity import Fidelity

_KEPT_BYTES = 512 << 20  # of full-precision log-probabilities held for the comparison
_SEQUENCE = 512  # tokens

__all__ = ["Fidelity", "FidelityProbe", "FidelityTally", "held_out"]


class FidelityTally:
    """Adds up what distributions before and after a change differ in."""

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []  # of each position
        self._loss = self._loss_full = 0.0
        self._agree = 0

    def add(self, before: Tensor, after: Tensor, following: Sequence[int]) -> None:
        """Takes log-probabilities float32 [tokens, vocab] of both models, and the tokens that really followed."""
        really = torch.tensor(following, device=after.device)[:, None]
        self._divergences.append((before.exp() * (before - after)).sum(dim=-1))
        self._agree += int((before.argmax(-1) == after.argmax(-1)).sum().item())
        self._loss -= after.gather(1, really).sum().item()
        self._loss_full -= before.gather(1, really).sum().item()

    def figures(self) -> Fidelity:
        """Over all that was added."""
        kl = torch.cat(self._divergences).cpu()  # an NPU has no float64
        n = len(kl)
        full, changed = (torch.tensor(total / n).exp().item() for total in (self._loss_full, self._loss))
        return Fidelity(n, kl.double().mean().item(), self._agree / n, full, changed, kl.quantile(0.99).item())


def held_out(sequences: Iterable[Sequence[int]], vocab: int, positions: int, tokens: int = 4096) -> list[list[int]]:
    """As many leading tokens of each sequence as make up `tokens` and fit the memory meant for their distributions."""
    budget = min(tokens, _KEPT_BYTES // (4 * vocab))
    kept: list[list[int]] = []
    for ids in sequences:
        leading = list(ids[: min(_SEQUENCE, positions, budget + 1)])
        if len(leading) > 1:
            kept.append(leading)
            budget -= len(leading) - 1
        if budget <= 0:
            break
    if not kept:
        raise QuasarError(
            "a quantised model is measured on texts of two tokens or more, and there are none; see --heldout"
        )
    return kept


class FidelityProbe:
    """Records a decoder's log-probabilities, and compares them with those of the same decoder changed."""

    def __init__(self, decoder: Decoder, sequences: Sequence[Sequence[int]], tokens: int = 4096) -> None:
        config = decoder.config
        self._sequences = held_out(sequences, config.vocab_size, config.max_position_embeddings, tokens)
        self._before = [_log_probs(decoder, ids) for ids in self._sequences]

    def compare(self, decoder: Decoder) -> Fidelity:
        """The figures for the decoder as it is now."""
        tally = FidelityTally()
        for ids, before in zip(self._sequences, self._before, strict=True):
            tally.add(before, _log_probs(decoder, ids), ids[1:])
        return tally.figures()


def _log_probs(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    """float32 [len(ids) - 1, vocab]: what is predicted after each token but the last."""
    inputs = ids[:-1]
    return decoder.read(inputs, logits_to_keep=len(inputs)).log_softmax(dim=-1)
