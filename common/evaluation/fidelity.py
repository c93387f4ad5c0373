"""What each verifier costs in fidelity and what it gains in acceptance: the papers' quantisation against pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from quasar.drafting.draft_models import calibration_ids
from quasar.errors import QuasarError
from quasar.generation import GenerationSettings, generate
from quasar.models.decoder import Decoder
from quasar.models.linear_int4 import in_w4a4
from quasar.models.model import Model
from quasar.models.pruning import layers_to_keep
from quasar.models.sharing import share
from quasar.quantization.fidelity import Fidelity, FidelityProbe
from quasar.quantization.methods import W8A8, Int4, Method, best_int4
from quasar.quantization.recipe import DEFAULT_RECIPE
from quasar.quantization.stream import quantized_decoder
from quasar.speculation.rows import PUBLISHED_GAMMA

PRUNED_SHARES = (0.10, 0.25, 0.50)  # of the layers, as in table 5 of arXiv 2603.01399


@dataclass(frozen=True)
class VerifierFidelity:
    """One verifier. acceptance: mean acceptance length by drafter name, at gamma 5 unless asked otherwise; drafters
    that cannot draft for it are missing."""

    verifier: str
    fidelity: Fidelity
    weight_bytes_per_pass: int
    acceptance: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def verifiers(model: Model, calibration: Sequence[Sequence[int]]) -> Iterator[tuple[str, Model]]:
    """Every verifier as a model of its own, one at a time, made of a full-precision model's weights."""

    def variant(precision: str, decoder: Decoder) -> Model:
        return model.with_decoder(decoder, precision)

    def quantized(method: Method) -> Model:
        decoder, _ = quantized_decoder(model.config, model.weights, model.decoder.backend, method, calibration)
        return variant(method.precision, decoder)

    yield "full", variant("full", model.decoder)
    c = model.config
    yield "w8a8", quantized(DEFAULT_RECIPE.method(c))
    yield "w8a8, int8 inputs throughout", quantized(replace(DEFAULT_RECIPE, wide=()).method(c))
    yield "w8a8 as published", quantized(W8A8(c, 0.5))
    yield "w8a8 without SmoothQuant", quantized(W8A8(c, smooth=False))
    zeros = Int4(c, group=32, symmetric=False, rotated=False, rounding="gptq", whole_zeros=True)
    yield "w4a16 with zero points", quantized(zeros)
    w4a16 = quantized(best_int4(c, model.weights, model.decoder.backend))
    yield "w4a16", w4a16
    yield "w4a4", variant("w4a4", share(w4a16.decoder, convert=in_w4a4))
    del w4a16
    layers = model.config.num_layers
    for part in PRUNED_SHARES:
        skipped = min(max(round(part * layers), 1), layers - 2)
        kept = layers_to_keep(model.decoder, skipped, calibration_ids(model))
        pruned = variant("full", share(model.decoder, keep=kept))
        yield f"pruned {part:.0%} ({skipped} of {layers} layers)", pruned


def measure_fidelity(
    model: Model,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    calibration: Sequence[Sequence[int]],
    drafts: Sequence[str],
    settings: GenerationSettings,
    tick: Callable[[str], object] = lambda name: None,
) -> Iterator[VerifierFidelity]:
    """model: in full precision; texts: token ids to compare distributions on; prompts: to generate from
    with each drafter; settings: of that, gamma None meaning the published 5."""
    probe = FidelityProbe(model.decoder, texts)
    settings = replace(settings, gamma=settings.gamma or PUBLISHED_GAMMA)
    for name, verifier in verifiers(model, calibration):
        tick(name)
        fidelity = probe.compare(verifier.decoder)
        lengths = {}
        for draft in drafts:
            length = acceptance_length(verifier, prompts, replace(settings, draft=draft))
            if length is not None:
                lengths[draft] = length
        yield VerifierFidelity(name, fidelity, verifier.decoder.weight_bytes_per_pass, lengths)


def acceptance_length(model: Model, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> float | None:
    """Tokens per verification pass over all prompts; None where this drafter cannot draft for this model."""
    try:
        stats = [generate(model, ids, settings).result().stats for ids in prompts]
    except QuasarError:
        return None
    return sum(s.tokens - 1 for s in stats) / max(sum(s.passes for s in stats), 1)
