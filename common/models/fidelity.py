"""The figures that say what quantising did to a model."""

from __future__ import annotations

from dataclasses import dataclass


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
