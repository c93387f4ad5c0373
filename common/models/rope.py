"""Rotary embeddings (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them over longer texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quasar.errors import QuasarError, shorten

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from rope_theta's own. One of linear (all divided by factor), llama3 (Llama 3.1: only
    the slow ones), yarn (Peng et al. 2023, arXiv 2309.00071), or factors (each frequency divided by its own)."""

    kind: str
    factor: float = 1.0
    original_positions: int = 0  # that the model was trained on before it was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    attention_factor: float = 1.0  # yarn: of cosines and sines, which scales q k^T by its square
    factors: tuple[float, ...] = ()  # [head_dim / 2], as llama.cpp stores Llama 3's

    def positions(self, stated: int) -> int:
        """Positions to run at: yarn's configurations may state those from before the stretching."""
        return max(stated, int(self.factor * self.original_positions)) if self.kind == "yarn" else stated

    def stretch(self, frequency: Tensor, theta: float) -> Tensor:
        """The scaled frequencies, float32 [head_dim / 2], of the plain ones."""
        if self.kind == "factors":
            return frequency / torch.tensor(self.factors)
        if self.kind == "linear":
            return frequency / self.factor
        return self._llama3(frequency) if self.kind == "llama3" else self._yarn(frequency, theta)

    def _llama3(self, frequency: Tensor) -> Tensor:
        """Waves shorter than original_positions / high_freq_factor stay; those longer than original_positions /
        low_freq_factor are divided by factor; between them the two are mixed."""
        waves = self.original_positions * frequency / (2 * math.pi)  # that fit into the original context
        mix = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        mix = mix.clamp(0, 1)
        return (1 - mix) * frequency / self.factor + mix * frequency

    def _yarn(self, frequency: Tensor, theta: float) -> Tensor:
        """Section 3.2 of the paper: dimensions that turn more than beta_fast times over the original context stay,
        those that turn less than beta_slow times are divided by factor, with a linear ramp between."""
        half = len(frequency)

        def dimension(turns: float) -> float:
            return half * math.log(self.original_positions / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = (torch.arange(half, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        ramp = ramp.clamp(0, 1)
        return frequency / self.factor * ramp + frequency * (1 - ramp)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / theta**exponent
    return frequency if scaling is None else scaling.stretch(frequency, theta)


def rope_fields(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """What config.json says on rotary embeddings, under its present or its older name."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise QuasarError(f"{path}: rope_parameters is {shorten(repr_of(rope))}; it should be an object")
    return rope


def rope_scaling(path: Path, rope: dict[str, Any], positions: int) -> RopeScaling | None:
    """The scaling that `rope` describes, None where there is none. Raises QuasarError on kinds and numbers that
    Quasar does not run."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise QuasarError(
            f"{path}: rope scaling {shorten(repr_of(kind))} is not supported; Quasar runs {', '.join(KINDS)}"
        )
    if kind == "default":
        return None

    def number(name: str, default: float | None = None) -> float:
        value = rope.get(name)
        return positive_number(path, f"rope scaling's {name}", default if value is None else value)

    original = number("original_max_position_embeddings", positions)
    factor = number("factor", positions / original if kind == "yarn" else None)
    if factor < 1:
        raise QuasarError(f"{path}: rope scaling's factor is {factor:g}; it must be 1 or more")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if original > positions * 64 or original < 2:
        raise QuasarError(
            f"{path}: rope scaling's original_max_position_embeddings is {original:g}; "
            f"max_position_embeddings is {positions}"
        )
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise QuasarError(f"{path}: rope scaling's high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        return RopeScaling("llama3", factor, int(original), low, high)
    return RopeScaling(
        "yarn",
        factor,
        int(original),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(path, rope, factor),
    )


def _yarn_attention_factor(path: Path, rope: dict[str, Any], factor: float) -> float:
    """As stated; else the paper's 0.1 ln(factor) + 1 (eq. 22), or the ratio of two of them that DeepSeek introduced."""
    if rope.get("attention_factor") is not None:
        return positive_number(path, "rope scaling's attention_factor", rope["attention_factor"])

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        one, other = (
            positive_number(path, f"rope scaling's {name}", rope[name]) for name in ("mscale", "mscale_all_dim")
        )
        return magnitude(one) / magnitude(other)
    return magnitude(1.0)


def positive_number(path: Path, name: str, value: Any) -> float:
    """A finite float above zero; QuasarError where the file has something else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise QuasarError(f"{path}: {name} is {shorten(repr_of(value))}; it must be a positive number")
    try:
        return float(value)
    except OverflowError:
        raise QuasarError(f"{path}: {name} is beyond what a float can hold; it must be a positive number") from None


def repr_of(value: Any) -> str:
    """repr, of whole numbers of any length too."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"
