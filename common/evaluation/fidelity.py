"""What each verifier costs in fidelity and what it gains in acceptance: the papers' quantisation against pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from quasar.drafting.draft_models import calibration_ids
from quasar.errors import QuasarError
from quasar.generation import GenerationSettings, generate
from quasar.models.decoder import Decoder
from quasar.models.linear import W8A8Linear
from quasar.models.linear_int4 import W4A4Linear, W4A16Linear
from quasar.models.model import Model
from quasar.models.pruning import layers_to_keep
from quasar.models.sharing import share, unpacked_copy
from quasar.quantization import quantize_int4, quantize_w8a8
from quasar.quantization.calibration import SMOOTHED
from quasar.quantization.fidelity import Fidelity, FidelityProbe
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
    """Every verifier as a model of its own, one at a time, over an unpacked full-precision model's tensors."""

    def variant(precision: str, change: Callable[[Decoder], None]) -> Model:
        decoder = unpacked_copy(model.decoder)
        # Packing is for good, and the full-precision model is needed again: lm_head must not be shared with it.
        decoder.lm_head = type(decoder.lm_head)(decoder.backend, decoder.lm_head.weight, decoder.lm_head.bias)
        change(decoder)
        return model.with_decoder(decoder, precision)

    def without_smoothing(decoder: Decoder) -> None:
        for layer in decoder.layers:
            for name in SMOOTHED:
                setattr(layer, name, W8A8Linear.from_full(getattr(layer, name)))

    yield "full", variant("full", lambda _: None)
    yield "w8a8", variant("w8a8", lambda d: quantize_w8a8(d, calibration))
    yield "w8a8 without SmoothQuant", variant("w8a8", without_smoothing)
    yield "w4a16", variant("w4a16", lambda d: quantize_int4(d, W4A16Linear))
    yield "w4a4", variant("w4a4", lambda d: quantize_int4(d, W4A4Linear))
    layers = model.config.num_layers
    for part in PRUNED_SHARES:
        skipped = min(max(round(part * layers), 1), layers - 2)
        kept = layers_to_keep(model.decoder, skipped, calibration_ids(model))
        pruned = variant("full", lambda _: None)
        pruned.decoder = share(pruned.decoder, keep=kept)
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
    """model: unpacked and in full precision; texts: token ids to compare distributions on; prompts: to generate from
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
