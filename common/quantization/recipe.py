"""What W8A8 is made with: the choices that were measured, as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quasar.checkpoints.weights import LINEARS
from quasar.errors import QuasarError
from quasar.models.config import ModelConfig
from quasar.quantization.methods import FITTED, W8A8

ROUNDINGS = ("gptq", "nearest")


@dataclass(frozen=True)
class Recipe:
    """docs/quantization.md has the measurements behind the defaults."""

    alpha: float | str | None = FITTED  # SmoothQuant's; None searches it per layer, FITTED fits scales to a noise model
    rounding: str = "gptq"  # of weights
    budget: float = 0.0  # share of the bytes of a pass that layers left in 16 bits may add
    # Linear layers whose inputs keep 16 bits, as two int8 digits; lm_head's where that is int8 at all.
    wide: tuple[str, ...] = ("qkv", "down", "lm_head")

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.rounding not in ROUNDINGS:
            raise QuasarError(f"--rounding {self.rounding} is unknown; use one of {', '.join(ROUNDINGS)}")
        known = (*LINEARS, "lm_head")
        if unknown := [name for name in self.wide if name not in known]:
            raise QuasarError(f"--wide {unknown[0]} is no linear layer; use some of {', '.join(known)}, or none")
        if not 0 <= self.budget <= 1:
            raise QuasarError(f"--budget {self.budget:.0%}: a share of the bytes of a pass, from 0% to 100%")

    def __str__(self) -> str:
        smoothing = {None: "alpha searched per layer", FITTED: "scales fitted to rounding noise"}
        chosen = smoothing.get(self.alpha, f"alpha {self.alpha}")
        rounded = f"weights rounded {'by GPTQ' if self.rounding == 'gptq' else 'to nearest'}"
        inner = [name for name in self.wide if name in LINEARS]
        wide = f"16-bit inputs before {' and '.join(inner)}; " if inner else ""
        return f"{wide}SmoothQuant, {chosen}; {rounded}"

    def method(self, config: ModelConfig, keep: Iterable[tuple[int, str]] = (), static: bool = False) -> W8A8:
        """keep: (layer, linear layer) pairs whose weights stay in 16 bits too; static: one scale per tensor for int8
        activations."""
        return W8A8(config, self.alpha, static, rounding=self.rounding, keep=keep, wide=self.wide)


def check_alpha(alpha: float | str | None) -> None:
    """Raises QuasarError unless it is a migration strength, FITTED, or None to search it."""
    if alpha is None or alpha == FITTED:
        return
    if isinstance(alpha, str) or not 0 <= alpha <= 1:
        raise QuasarError(
            f"--alpha {alpha}: SmoothQuant's migration strength lies between 0 and 1; or say auto or {FITTED}"
        )


DEFAULT_RECIPE = Recipe()


def pass_bytes(c: ModelConfig) -> int:
    """Bytes of the matrices that a pass in W8A8 reads."""
    table = c.vocab_size * c.hidden_size
    layers = c.matrix_parameters - table * (1 if c.tie_word_embeddings else 2)
    return layers + table * c.dtype.itemsize
