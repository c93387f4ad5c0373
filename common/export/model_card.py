"""README.md of a quantised checkpoint: what it is made of, how, and what that cost."""

from __future__ import annotations

from pathlib import Path

from quasar.export.settings import ExportSettings
from quasar.models.fidelity import Fidelity


def model_card(
    model: str,
    folder: Path,
    settings: ExportSettings,
    fidelity: Fidelity,
    command: str,
    smoothing: str,
    calibration: str,
) -> str:
    """README.md of a quantised checkpoint."""
    activations = "one calibrated scale per tensor" if settings.static else "one scale per token, computed on the fly"
    serve = "vllm serve DIR" + (" --quantization ascend   # vLLM-Ascend" if settings.format == "ascend" else "")
    base = f"base_model: {model}\n" if "/" in model and not Path(model).exists() else ""
    return f"""---
{base}library_name: transformers
tags: [w8a8, int8, {settings.format}, quasar]
---

# {folder.resolve().name} in W8A8

| | |
|---|---|
| made of | {model} |
| format | {settings.format} |
| scheme | {settings.scheme}: int8 weights, one scale per output channel; int8 activations, {activations} |
| full precision | embedding, norms{"" if settings.lm_head == "w8a8" else ", lm_head"} |
| smoothing | {smoothing} |
| calibration | {calibration} |
| mean KL (full precision to W8A8) | {fidelity.mean_kl:.3e} nats |
| top-1 agreement | {fidelity.top1_agreement:.2%} |
| perplexity | {fidelity.perplexity:.3f} (full precision {fidelity.perplexity_full:.3f}) |
| measured on | {fidelity.tokens} held-out tokens |

Made by

    {command or "quasar.export.export.quantize_checkpoint"}

Run it with

    quasar generate --model DIR "Hello"
    {serve}
"""
