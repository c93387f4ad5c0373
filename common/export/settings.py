"""What to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quasar.checkpoints import WRITERS
from quasar.checkpoints.weights import INT4_GROUPS
from quasar.errors import QuasarError
from quasar.loading import LM_HEADS
from quasar.models.config import ModelConfig
from quasar.quantization.methods import Int4, Method
from quasar.quantization.recipe import Recipe

SCHEMES = ("w8a8", "w8a8-static", "w4a16")
PLAIN_RECIPE = Recipe(wide=())  # W8A8 throughout, which every program that reads these formats runs


@dataclass(frozen=True)
class ExportSettings:
    """What to write."""

    format: str = "compressed-tensors"  # or ascend
    scheme: str = "w8a8"  # or w8a8-static, w4a16
    recipe: Recipe = PLAIN_RECIPE  # of W8A8
    lm_head: str = "full"  # or w8a8
    group: int = 32  # of w4a16: inputs that share a scale

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", tuple(WRITERS)),
            ("scheme", SCHEMES),
            ("lm_head", LM_HEADS),
            ("group", INT4_GROUPS),
        ):
            if getattr(self, name) not in allowed:
                some = ", ".join(map(str, allowed))
                raise QuasarError(f"{name} {getattr(self, name)} is unknown; use one of {some}")
        if self.scheme == "w4a16" and self.lm_head != "full":
            raise QuasarError(f"--lm-head {self.lm_head}: one checkpoint holds int8 or int4 layers, not both")

    @property
    def static(self) -> bool:
        """Whether activations have one calibrated scale per tensor."""
        return self.scheme == "w8a8-static"

    def method(self, config: ModelConfig, kept: list[tuple[int, str]]) -> Method:
        """How the model is quantised; kept: (layer, linear layer) pairs that stay in 16 bits."""
        if self.scheme == "w4a16":  # what the format can say: no rotation
            whole = WRITERS[self.format].whole_zero_points
            return Int4(config, group=self.group, symmetric=False, rotated=False, rounding="gptq", whole_zeros=whole)
        return self.recipe.method(config, kept, self.static)

    def how(self) -> str:
        """The method in words."""
        if self.scheme == "w4a16":
            whole = "whole " if WRITERS[self.format].whole_zero_points else ""
            return f"GPTQ, asymmetric groups of {self.group} inputs with {whole}zero points"
        return str(self.recipe)

    def writer(self) -> Any:
        """What makes tensors of weights."""
        if self.scheme == "w4a16":
            return WRITERS[self.format](self.scheme, False, self.group, symmetric=False)
        return WRITERS[self.format](self.scheme, self.lm_head == "w8a8", wide=self.recipe.wide)
