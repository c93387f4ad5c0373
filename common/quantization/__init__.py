"""Full precision -> W8A8 (calibrate, smooth, quantise) or int4 weights (rotate, quantise), and see what it did."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from quasar.checkpoints.weights import Int8Weights
from quasar.models.linear import W8A8Linear, quantize_linear
from quasar.models.linear_int4 import W4A16Linear
from quasar.quantization.calibration import SMOOTHED, InputStats, collect
from quasar.quantization.rotation import rotate_decoder
from quasar.quantization.smoothquant import smooth_layer

if TYPE_CHECKING:
    from quasar.models.decoder import Decoder, DecoderLayer

SEARCH_ROWS = 256  # sampled inputs per linear layer for the search over alpha
log = logging.getLogger(__name__)


def quantize_w8a8(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    alpha: float | None = 0.5,
    progress: bool = False,
) -> None:
    """Turns an unpacked full-precision decoder into W8A8 in place: SmoothQuant, then int8, layer by layer.

    sequences are token ids to calibrate on; alpha None searches for the best per layer. lm_head, embedding and norms
    stay in full precision.
    """
    stats = collect(decoder, sequences, SEARCH_ROWS if alpha is None else 0, progress)
    for layer in tqdm(decoder.layers, desc="quantising", unit="layer", disable=not progress, leave=False):
        quantize_layer(layer, stats[layer.index], alpha, decoder.config.dtype)
        stats[layer.index].clear()


def quantize_layer(
    layer: DecoderLayer,
    stats: dict[str, InputStats],
    alpha: float | None,
    dtype: torch.dtype,
    static: bool = False,
) -> dict[str, Int8Weights]:
    """Smooths one unpacked layer and makes its linear layers W8A8 in place; returns what they were made of.

    dtype is the checkpoint's. static gives activations one scale per tensor, from the peaks in stats.
    """
    used = smooth_layer(layer, stats, alpha, dtype)
    log.debug("layer %d: alpha %s", layer.index, used)
    made = {}
    for name in SMOOTHED:
        linear = getattr(layer, name)
        made[name] = quantize_linear(linear, static_scale(stats[name].peak) if static else None)
        setattr(layer, name, W8A8Linear.of(linear.backend, made[name]))
    return made


def static_scale(peak: torch.Tensor) -> torch.Tensor:
    """float32 [1] for inputs whose channels peak at `peak` [in]."""
    return (peak.amax(keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)


def quantize_int4(decoder: Decoder, linear: type[W4A16Linear], progress: bool = False) -> None:
    """Turns an unpacked full-precision decoder into W4A16 or W4A4 (the class of its linear layers) in place:
    Hadamard rotation, then int4 weights, layer by layer. Needs no calibration.

    lm_head, embedding and norms stay in full precision, rotated. Raises QuasarError where the device has no int4.
    """
    # The smallest layer there is: a device that has no int4 says so before anything is rotated.
    decoder.backend.int4_weight(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 1, dtype=torch.bfloat16))
    online = rotate_decoder(decoder)
    for layer in tqdm(decoder.layers, desc="quantising", unit="layer", disable=not progress, leave=False):
        for name in SMOOTHED:
            full = getattr(layer, name)
            setattr(layer, name, linear.from_full(full, online if name == "down" else None))
