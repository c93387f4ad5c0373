"""What to write."""

from __future__ import annotations

from dataclasses import dataclass

from quasar.checkpoints import WRITERS
from quasar.errors import QuasarError
from quasar.loading import LM_HEADS, check_alpha

SCHEMES = ("w8a8", "w8a8-static")


@dataclass(frozen=True)
class ExportSettings:
    """What to write."""

    format: str = "compressed-tensors"  # or ascend
    scheme: str = "w8a8"  # or w8a8-static
    alpha: float | None = 0.5  # SmoothQuant's migration strength; None searches it per layer
    lm_head: str = "full"  # or w8a8

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        for name, allowed in (("format", tuple(WRITERS)), ("scheme", SCHEMES), ("lm_head", LM_HEADS)):
            if getattr(self, name) not in allowed:
                raise QuasarError(f"{name} {getattr(self, name)} is unknown; use one of {', '.join(allowed)}")

    @property
    def static(self) -> bool:
        """Whether activations have one calibrated scale per tensor."""
        return self.scheme == "w8a8-static"
