"""The two verbs before `generate`: get a model, and quantise it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.backends.base import Backend
from quasar.errors import QuasarError
from quasar.memory import out_of_memory_in_one_line
from quasar.models.build import WeightSource, assemble
from quasar.models.config import ModelConfig
from quasar.models.decoder import Decoder
from quasar.models.fidelity import Fidelity
from quasar.models.linear_int4 import in_w4a4
from quasar.models.loader import CheckpointWeights, RandomTensors
from quasar.models.model import DEFAULT_MODEL, LoadOptions, Model, open_model
from quasar.models.own_text import own_text
from quasar.models.sharing import share
from quasar.models.weights_cache import WeightsCache, source_digest
from quasar.quantization.budget import choose_kept, describe
from quasar.quantization.calibration import read_texts
from quasar.quantization.kv import kv_fidelity
from quasar.quantization.methods import FITTED, W8A8, Method, SameLayers, best_int4
from quasar.quantization.recipe import DEFAULT_RECIPE, Recipe, pass_bytes
from quasar.quantization.stream import quantized_decoder
from quasar.quantization.texts import calibration_and_heldout, heldout_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import

PRECISIONS = ("full", "w8a8", "w4a16", "w4a4")
LM_HEADS = ("full", "w8a8")
# Below this share of equal top-1 tokens a quantised model is garbage rather than a little different.
MIN_AGREEMENT = {"w8a8": 0.80, "w4a16": 0.50, "w4a4": 0.50}

log = logging.getLogger(__name__)


@out_of_memory_in_one_line()
def load(
    model: str | PathLike[str] = DEFAULT_MODEL,
    *,
    device: str = "auto",
    precision: str | None = "auto",
    dtype: str = "auto",
    lossless: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
    kv: str = "auto",
    prompts: Sequence[str] | None = None,
    heldout: Sequence[str] | None = None,
    lm_head: str = "full",
    recipe: Recipe = DEFAULT_RECIPE,
    force: bool = False,
    cache: WeightsCache | None = None,
) -> Model:
    """Loads a checkpoint folder, a GGUF file, a shipped model (tiny-qwen3, tiny-openpangu), smollm2, a hub name, or
    `dummy:SHAPE`.

    precision "auto" takes the checkpoint's own; None takes a quantised checkpoint's own, and w8a8 of any other. Others
    quantise a full-precision checkpoint, calibrated on prompts and measured on heldout (None: built-in texts); lm_head,
    recipe and force are those of `quantize`. What was quantised is kept in `cache` (None: the user's own), so that the
    next start only maps it. "full" refuses a quantised checkpoint. lossless keeps the full-precision weights beside the
    quantised ones, for generating with lossless=True.
    kv: what keys and values are kept in on CPU, float32, bfloat16 or int8.
    """
    if precision not in ("auto", None, *PRECISIONS):
        raise QuasarError(f"--precision {precision} is unknown; use one of {', '.join(PRECISIONS)}")
    found = open_model(fspath(model), LoadOptions(device, dtype, trust_remote_code, progress, kv))
    if precision is None:
        precision = "auto" if found.is_quantized else "w8a8"
    if precision in ("auto", "full") or found.is_quantized:
        loaded = found.model(found.decoder(progress))
        if precision not in ("auto", loaded.precision):
            raise QuasarError(
                f"{model} is quantised ({loaded.precision}); --precision {precision} needs the model it was made of"
            )
        _say_what_kv_costs(loaded, kv, heldout)
        return loaded
    found.backend.require_memory(quantized_bytes(found.config, precision), f"loading {model}")
    full = found.decoder(progress) if lossless else None
    decoder, fidelity = _quantized(
        found.name,
        found.config,
        found.weights,
        found.backend,
        found.tokenizer,
        prompts,
        precision=precision,
        lm_head=lm_head,
        heldout=heldout,
        recipe=recipe,
        force=force,
        progress=progress,
        files=found.files,
        cache=cache or WeightsCache(),
    )
    quantized = replace(found.model(decoder), precision=precision, fidelity=fidelity, full=full, weights=None)
    _say_what_kv_costs(quantized, kv, heldout)
    return quantized


def _say_what_kv_costs(model: Model, kv: str, heldout: Sequence[str] | None) -> None:
    """Of int8, which is for little memory; bfloat16 changes near ties alone (docs/cpu.md)."""
    if kv == "int8" and model.tokenizer is not None:
        texts = heldout_texts(model.tokenizer, heldout)
        log.warning("--kv int8 against float32: %s", kv_fidelity(model.decoder, texts))


@out_of_memory_in_one_line()
def quantize(
    model: Model,
    prompts: Sequence[str] | None = None,
    *,
    precision: str = "w8a8",
    lm_head: str = "full",
    keep_full: bool = False,
    heldout: Sequence[str] | None = None,
    alpha: float | str | None = FITTED,
    rounding: str = "gptq",
    budget: float = 0.0,
    wide: Sequence[str] = DEFAULT_RECIPE.wide,
    force: bool = False,
    progress: bool = False,
) -> Fidelity | None:
    """Makes a full-precision model "w8a8", "w4a16" or "w4a4" in place, and measures what that did on held-out text.

    prompts are texts to calibrate on, heldout texts to measure on (None: built-in ones). For w8a8 alpha is
    SmoothQuant's migration strength ("fitted": scales fitted to a model of rounding noise; None: searched per layer),
    rounding of weights is "gptq" or "nearest"; inputs of the linear layers `wide` keep 12 bits, and the linear layers
    whose rounding costs most stay in 16 bits, as long as they add no more than `budget` (0.02: 2 %) to the bytes of a
    pass. lm_head "w8a8" makes that layer int8 too. keep_full keeps the full-precision decoder in `model.full`.

    Raises QuasarError if the result is garbage, unless force. Returns None for a model without a tokenizer, which has
    no text to be measured on.
    """
    if model.weights is None or model.precision != "full":
        raise QuasarError(f"{model.name} is already quantised ({model.precision}); load it again in full precision")
    decoder, fidelity = _quantized(
        model.name,
        model.config,
        model.weights,
        model.decoder.backend,
        model.tokenizer,
        prompts,
        precision=precision,
        lm_head=lm_head,
        heldout=heldout,
        recipe=Recipe(alpha, rounding, budget, tuple(wide)),
        force=force,
        progress=progress,
    )
    model.full = model.decoder if keep_full else None
    model.decoder, model.precision, model.fidelity, model.weights = decoder, precision, fidelity, None
    model.draft_runtimes.clear()
    return fidelity


def _quantized(
    name: str,
    config: ModelConfig,
    weights: WeightSource,
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str] | None = None,
    *,
    precision: str,
    lm_head: str = "full",
    heldout: Sequence[str] | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    force: bool = False,
    progress: bool = False,
    files: Sequence[Path] = (),
    cache: WeightsCache | None = None,
) -> tuple[Decoder, Fidelity | None]:
    """files: what weights are read from; with them and a cache, what was quantised before is only mapped."""
    if lm_head not in LM_HEADS:
        raise QuasarError(f"--lm-head {lm_head} is unknown; use one of {', '.join(LM_HEADS)}")
    texts: list[list[int]] = []
    measured: list[list[int]] = []
    if tokenizer is not None:
        texts, measured = calibration_and_heldout(config, tokenizer, prompts, heldout)
    elif not files:  # random weights: any ids do
        texts = [list(range(min(64, config.max_position_embeddings, config.vocab_size)))]
    key, writer = "", None
    if files and cache is not None and cache.enabled:
        key = cache.key(files, _cache_settings(config, backend, precision, lm_head, recipe, texts, measured))
        cached = cache.open(key, backend.place)
        if cached is not None:
            decoder = assemble(config, cached, backend, progress)
            fidelity = None if cached.about["fidelity"] is None else Fidelity(**cached.about["fidelity"])
            return _finished(name, decoder, fidelity, precision, force)
        writer = cache.writer(key)
    if not texts:
        texts = own_text(assemble(config, weights, backend))
    method: Method
    random = isinstance(weights, CheckpointWeights) and isinstance(weights.source, RandomTensors)
    if random and not recipe.budget:
        nearest = W8A8(config, smooth=False, wide=recipe.wide)
        method = SameLayers(nearest if precision == "w8a8" else best_int4(config, weights, backend, "nearest"))
    elif precision != "w8a8":
        method = best_int4(config, weights, backend)
    else:
        method = recipe.method(config)
        budget = int(recipe.budget * pass_bytes(config))
        if budget:
            kept = choose_kept(config, weights, backend, method, texts, budget, progress)
            log.info("%s", describe(kept, pass_bytes(config)))
            keep = [(each.layer, each.name) for each in kept]
            method = recipe.method(config, keep)
    try:
        decoder, fidelity = quantized_decoder(
            config, weights, backend, method, texts, measured, lm_head, progress, keep=writer
        )
        if isinstance(weights, CheckpointWeights):
            weights.finish()
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    if writer is not None:
        about = {"model": name, "precision": method.precision, "recipe": str(recipe), "device": backend.name}
        figures = None if fidelity is None else asdict(fidelity)
        writer.finish(about | {"fidelity": figures, "mean_kl": None if fidelity is None else fidelity.mean_kl})
    return _finished(name, decoder, fidelity, precision, force)


def _finished(
    name: str, decoder: Decoder, fidelity: Fidelity | None, precision: str, force: bool
) -> tuple[Decoder, Fidelity | None]:
    """With the activations of the precision, and not as garbage."""
    if precision == "w4a4":
        decoder = share(decoder, convert=in_w4a4)
    if fidelity is not None:
        log.info("%s against full precision: %s", precision.upper(), fidelity)
        require_agreement(name, fidelity, precision, force)
    return decoder, fidelity


def _cache_settings(
    config: ModelConfig,
    backend: Backend,
    precision: str,
    lm_head: str,
    recipe: Recipe,
    texts: Sequence[Sequence[int]],
    measured: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """All that quantised weights depend on, beside the checkpoint."""
    here = Path(__file__).parent
    models = [here / "models" / name for name in ("loader.py", "weights_cache.py")]
    return {
        "config": repr(config),
        "method": "w8a8" if precision == "w8a8" else "int4",  # w4a4 is w4a16 with other activations
        "lm_head": lm_head,
        "recipe": asdict(recipe) if precision == "w8a8" else None,
        "device": [backend.name, str(backend.dtype), str(backend.linear_dtype)],
        "texts": texts,
        "measured": measured,
        "code": source_digest([here / "quantization", here / "checkpoints", *models]),
    }


def quantized_bytes(c: ModelConfig, precision: str, lm_head: str = "full") -> int:
    """What a quantised model's matrices take."""
    table = c.vocab_size * c.hidden_size
    layers = c.matrix_parameters - table * (1 if c.tie_word_embeddings else 2)
    head = 1 if lm_head == "w8a8" else 0 if c.tie_word_embeddings else c.dtype.itemsize
    return layers * (2 if precision == "w8a8" else 1) // 2 + table * (c.dtype.itemsize + head)


def require_agreement(name: str, fidelity: Fidelity, precision: str = "w8a8", force: bool = False) -> None:
    """Raises QuasarError if a quantised model measures as garbage, unless force."""
    # NaN compares false, so a model that broke is refused too.
    if not fidelity.top1_agreement >= MIN_AGREEMENT[precision] and not force:
        advice = "--budget 5%, other --calibration, or --force" if precision == "w8a8" else "w8a8, or --force"
        raise QuasarError(
            f"{name} in {precision.upper()} agrees with full precision on {fidelity.top1_agreement:.1%} of tokens, "
            f"below {MIN_AGREEMENT[precision]:.0%}: unusable; try {advice}"
        )


def texts_or_default(path: str | None) -> list[str] | None:
    """Texts of a JSONL file that a flag named; None where it named none."""
    return None if path is None else read_texts(Path(path))
