"""The two verbs before `generate`: get a model, and make it W8A8."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from common.errors import QuasarError
from common.models.model import ASSETS, DEFAULT_MODEL, LoadOptions, Model, load_checkpoint
from common.quantization import quantize_w8a8
from common.quantization.calibration import read_texts
from common.quantization.fidelity import Fidelity, FidelityProbe
from common.quantization.linear import FullLinear

PRECISIONS = ("full", "w8a8")
# Below this share of equal top-1 tokens a quantised model is garbage rather than a little different.
MIN_AGREEMENT = 0.80
CALIBRATION_TOKENS = 512  # of each prompt

log = logging.getLogger(__name__)


def load(
    model: str = DEFAULT_MODEL,
    *,
    device: str = "auto",
    precision: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Model:
    """Loads a checkpoint folder, a shipped model (tiny-qwen3, tiny-openpangu), a hub name, or `dummy:SHAPE`.

    precision "auto" takes the checkpoint's own, full or w8a8. "w8a8" calibrates a full-precision checkpoint on the
    built-in prompts and quantises it; call `quantize` yourself to choose. "full" refuses a quantised checkpoint.
    """
    if precision not in ("auto", *PRECISIONS):
        raise QuasarError(f"--precision {precision} is unknown; use one of {', '.join(PRECISIONS)}")
    loaded = load_checkpoint(model, LoadOptions(device, dtype, trust_remote_code, progress))
    if precision == "full" and loaded.precision != "full":
        raise QuasarError(f"{model} is quantised ({loaded.precision}); --precision full needs the model it was made of")
    if precision == "w8a8" and loaded.precision == "full":
        quantize(loaded, progress=progress)
    return loaded


def quantize(
    model: Model,
    prompts: Sequence[str] | None = None,
    *,
    heldout: Sequence[str] | None = None,
    alpha: float | None = 0.5,
    force: bool = False,
    progress: bool = False,
) -> Fidelity | None:
    """Makes a full-precision model W8A8 in place, and measures what that did to it on held-out text.

    prompts are texts to calibrate on, heldout texts to measure on (None: built-in ones); alpha is SmoothQuant's
    migration strength, None searches it per layer. Raises QuasarError if the result is garbage, unless force.
    Returns None for a model without a tokenizer, which has no text to be measured on.
    """
    check_alpha(alpha)
    decoder = model.decoder
    if not all(isinstance(linear, FullLinear) and linear.packed is None for linear in decoder.linears()):
        raise QuasarError(f"{model.name} is already quantised or in use; load it again in full precision")
    if model.tokenizer is None:
        ids = [list(range(64))]  # random weights: any ids do, the figures would mean nothing
        quantize_w8a8(decoder, ids, alpha, progress)
        model.precision = "w8a8"
        return None
    limit = min(CALIBRATION_TOKENS, decoder.config.max_position_embeddings)
    calibration = [ids[:limit] for ids in map(model.encode, prompts or read_texts(ASSETS / "calibration.jsonl")) if ids]
    probe = FidelityProbe(decoder, [model.encode(text) for text in heldout or read_texts(ASSETS / "heldout.jsonl")])
    quantize_w8a8(decoder, calibration, alpha, progress)
    model.precision = "w8a8"
    fidelity = probe.compare(decoder)
    log.info("W8A8 against full precision: %s", fidelity)
    require_agreement(model.name, fidelity, force)
    model.fidelity = fidelity
    return fidelity


def check_alpha(alpha: float | None) -> None:
    """Raises QuasarError unless it is a migration strength, or None to search it."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise QuasarError(f"--alpha {alpha}: SmoothQuant's migration strength lies between 0 and 1; or say auto")


def require_agreement(name: str, fidelity: Fidelity, force: bool = False) -> None:
    """Raises QuasarError if a quantised model measures as garbage, unless force."""
    # NaN compares false, so a model that broke is refused too.
    if not fidelity.top1_agreement >= MIN_AGREEMENT and not force:
        raise QuasarError(
            f"{name} in W8A8 agrees with full precision on {fidelity.top1_agreement:.1%} of tokens, "
            f"below {MIN_AGREEMENT:.0%}: unusable; try --alpha auto, other --calibration, or --force"
        )


def texts_or_default(path: str | None) -> list[str] | None:
    """Texts of a JSONL file that a flag named; None where it named none."""
    return None if path is None else read_texts(Path(path))
