"""The two verbs before `generate`: get a model, and quantise it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

from quasar.errors import QuasarError
from quasar.memory import out_of_memory_in_one_line
from quasar.models.decoder import Decoder
from quasar.models.linear import FullLinear, W8A8Linear
from quasar.models.linear_int4 import W4A4Linear, W4A16Linear
from quasar.models.model import ASSETS, DEFAULT_MODEL, LoadOptions, Model, load_checkpoint
from quasar.models.sharing import unpacked_copy
from quasar.quantization import quantize_int4, quantize_w8a8
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import Fidelity, FidelityProbe

_INT4 = {"w4a16": W4A16Linear, "w4a4": W4A4Linear}
PRECISIONS = ("full", "w8a8", *_INT4)
LM_HEADS = ("full", "w8a8")
# Below this share of equal top-1 tokens a quantised model is garbage rather than a little different.
MIN_AGREEMENT = {"w8a8": 0.80, "w4a16": 0.50, "w4a4": 0.50}
CALIBRATION_TOKENS = 512  # of each prompt

log = logging.getLogger(__name__)


@out_of_memory_in_one_line()
def load(
    model: str | PathLike[str] = DEFAULT_MODEL,
    *,
    device: str = "auto",
    precision: str = "auto",
    dtype: str = "auto",
    lossless: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Model:
    """Loads a checkpoint folder, a shipped model (tiny-qwen3, tiny-openpangu), a hub name, or `dummy:SHAPE`.

    precision "auto" takes the checkpoint's own, full or w8a8. "w8a8" calibrates a full-precision checkpoint on the
    built-in prompts and quantises it; call `quantize` yourself to choose. "full" refuses a quantised checkpoint.
    lossless keeps the full-precision weights beside the quantised ones, for generating with lossless=True.
    """
    if precision not in ("auto", *PRECISIONS):
        raise QuasarError(f"--precision {precision} is unknown; use one of {', '.join(PRECISIONS)}")
    loaded = load_checkpoint(fspath(model), LoadOptions(device, dtype, trust_remote_code, progress))
    if precision == "auto" or precision == loaded.precision:
        return loaded
    if loaded.precision != "full":
        raise QuasarError(
            f"{model} is quantised ({loaded.precision}); --precision {precision} needs the model it was made of"
        )
    quantize(loaded, precision=precision, keep_full=lossless, progress=progress)
    return loaded


@out_of_memory_in_one_line()
def quantize(
    model: Model,
    prompts: Sequence[str] | None = None,
    *,
    precision: str = "w8a8",
    lm_head: str = "full",
    keep_full: bool = False,
    heldout: Sequence[str] | None = None,
    alpha: float | None = 0.5,
    force: bool = False,
    progress: bool = False,
) -> Fidelity | None:
    """Makes a full-precision model "w8a8", "w4a16" or "w4a4" in place, and measures what that did on held-out text.

    prompts are texts to calibrate on, heldout texts to measure on (None: built-in ones); alpha is SmoothQuant's
    migration strength, None searches it per layer; int4 uses neither prompts nor alpha. lm_head "w8a8" makes that
    layer int8 too. keep_full keeps the full-precision decoder in `model.full`. Raises
    QuasarError if the result is garbage, unless force.
    Returns None for a model without a tokenizer, which has no text to be measured on.
    """
    if lm_head not in LM_HEADS:
        raise QuasarError(f"--lm-head {lm_head} is unknown; use one of {', '.join(LM_HEADS)}")
    check_alpha(alpha)
    decoder = model.decoder
    if not all(isinstance(linear, FullLinear) and linear.packed is None for linear in decoder.linears()):
        raise QuasarError(f"{model.name} is already quantised or in use; load it again in full precision")
    if keep_full:
        model.full, decoder = decoder, unpacked_copy(decoder)
        model.decoder = decoder
    if model.tokenizer is None:
        ids = [list(range(64))]  # random weights: any ids do, the figures would mean nothing
        _convert(decoder, precision, lm_head, ids, alpha, progress)
        model.precision = precision
        return None
    limit = min(CALIBRATION_TOKENS, decoder.config.max_position_embeddings)
    calibration = [ids[:limit] for ids in map(model.encode, prompts or read_texts(ASSETS / "calibration.jsonl")) if ids]
    probe = FidelityProbe(decoder, [model.encode(text) for text in heldout or read_texts(ASSETS / "heldout.jsonl")])
    _convert(decoder, precision, lm_head, calibration, alpha, progress)
    model.precision = precision
    fidelity = probe.compare(decoder)
    log.info("%s against full precision: %s", precision.upper(), fidelity)
    require_agreement(model.name, fidelity, precision, force)
    model.fidelity = fidelity
    return fidelity


def check_alpha(alpha: float | None) -> None:
    """Raises QuasarError unless it is a migration strength, or None to search it."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise QuasarError(f"--alpha {alpha}: SmoothQuant's migration strength lies between 0 and 1; or say auto")


def require_agreement(name: str, fidelity: Fidelity, precision: str = "w8a8", force: bool = False) -> None:
    """Raises QuasarError if a quantised model measures as garbage, unless force."""
    # NaN compares false, so a model that broke is refused too.
    if not fidelity.top1_agreement >= MIN_AGREEMENT[precision] and not force:
        advice = "--alpha auto, other --calibration, or --force" if precision == "w8a8" else "w8a8, or --force"
        raise QuasarError(
            f"{name} in {precision.upper()} agrees with full precision on {fidelity.top1_agreement:.1%} of tokens, "
            f"below {MIN_AGREEMENT[precision]:.0%}: unusable; try {advice}"
        )


def _convert(
    decoder: Decoder,
    precision: str,
    lm_head: str,
    calibration: Sequence[Sequence[int]],
    alpha: float | None,
    progress: bool,
) -> None:
    if precision in _INT4:
        quantize_int4(decoder, _INT4[precision], progress)
    else:
        quantize_w8a8(decoder, calibration, alpha, progress)
    if lm_head == "w8a8":  # not smoothed; a tied embedding keeps its own full-precision weight
        decoder.lm_head = W8A8Linear.from_full(decoder.lm_head)


def texts_or_default(path: str | None) -> list[str] | None:
    """Texts of a JSONL file that a flag named; None where it named none."""
    return None if path is None else read_texts(Path(path))
