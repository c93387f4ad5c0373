"""README.md of a quantised checkpoint: what it is made of, how, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quasar.export.settings import ExportSettings
from quasar.models.fidelity import Fidelity
from quasar.quantization.budget import Kept


def model_card(
    model: str,
    folder: Path,
    settings: ExportSettings,
    fidelity: Fidelity,
    command: str,
    method: str,
    calibration: str,
    kept: Sequence[Kept] = (),
) -> str:
    """README.md of a quantised checkpoint."""
    name = settings.scheme.partition("-")[0]
    activations = "int8 activations, one scale per token, computed on the fly"
    if settings.static:
        activations = "int8 activations, one calibrated scale per tensor"
    weights = "int8 weights, one scale per output channel"
    if name == "w4a16":
        weights, activations = f"int4 weights, a scale and zero point per {settings.group} inputs", "16-bit activations"
    elif wide := [each for each in settings.recipe.wide if each != "lm_head" or settings.lm_head == "w8a8"]:
        activations += f", 16-bit ones before {' and '.join(wide)}"
    full = ["embedding", "norms", *([] if settings.lm_head == "w8a8" else ["lm_head"])]
    full += [f"layer {each.layer} {each.name}" for each in kept]
    serve = "vllm serve DIR" + (" --quantization ascend   # vLLM-Ascend" if settings.format == "ascend" else "")
    if settings.format == "ascend" and name == "w4a16":
        serve = "quasar serve --model DIR   # or MindIE"
    base = f"base_model: {model}\n" if "/" in model and not Path(model).exists() else ""
    return f"""---
{base}library_name: transformers
tags: [{name}, {"int4" if name == "w4a16" else "int8"}, {settings.format}, quasar]
---

# {folder.resolve().name} in {name.upper()}

| | |
|---|---|
| made of | {model} |
| format | {settings.format} |
| scheme | {settings.scheme}: {weights}; {activations} |
| full precision | {", ".join(full)} |
| method | {method} |
| calibration | {calibration} |
| mean KL (full precision to {name.upper()}) | {fidelity.mean_kl:.3e} nats |
| top-1 agreement | {fidelity.top1_agreement:.2%} |
| perplexity | {fidelity.perplexity:.3f} (full precision {fidelity.perplexity_full:.3f}) |
| measured on | {fidelity.tokens} held-out tokens |

Made by

    {command or "quasar.export.export.quantize_checkpoint"}

Run it with

    quasar generate --model DIR "Hello"
    {serve}
"""
