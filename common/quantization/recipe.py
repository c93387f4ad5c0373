"""What W8A8 is made with: the choices that were measured, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from quasar.errors import QuasarError
from quasar.models.config import ModelConfig
from quasar.quantization.methods import FITTED

ROUNDINGS = ("gptq", "nearest")


@dataclass(frozen=True)
class Recipe:
    """docs/quantization.md has the measurements behind the defaults."""

    alpha: float | str | None = FITTED  # SmoothQuant's; None searches it per layer, FITTED fits scales to a noise model
    rounding: str = "gptq"  # of weights
    budget: float = 0.0  # share of the bytes of a pass that inputs left in 16 bits may add

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.rounding not in ROUNDINGS:
            raise QuasarError(f"--rounding {self.rounding} is unknown; use one of {', '.join(ROUNDINGS)}")
        if not 0 <= self.budget <= 1:
            raise QuasarError(f"--budget {self.budget:.0%}: a share of the bytes of a pass, from 0% to 100%")

    def __str__(self) -> str:
        smoothing = {None: "alpha searched per layer", FITTED: "scales fitted to rounding noise"}
        chosen = smoothing.get(self.alpha, f"alpha {self.alpha}")
        return f"SmoothQuant, {chosen}; weights rounded {'by GPTQ' if self.rounding == 'gptq' else 'to nearest'}"


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
