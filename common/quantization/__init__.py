"""Full precision -> W8A8 (calibrate, smooth, quantise) or int4 weights (rotate, quantise), and see what it did."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.quantization.calibration import SMOOTHED, collect
from common.quantization.linear import W4A16Linear, W8A8Linear
from common.quantization.rotation import rotate_decoder
from common.quantization.smoothquant import smooth_layer

if TYPE_CHECKING:
    from common.models.decoder import Decoder

SEARCH_ROWS = 256  # sampled inputs per linear layer for the search over alpha
log = logging.getLogger(__name__)


def quantize_w8a8(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    alpha: float | None = 0.5,
    progress: bool = False,
    lm_head: bool = False,
) -> None:
    """Turns an unpacked full-precision decoder into W8A8 in place: SmoothQuant, then int8, layer by layer.

    sequences are token ids to calibrate on; alpha None searches for the best per layer. Embedding and norms stay in
    full precision, and so does lm_head unless it is asked for; it is not smoothed.
    """
    stats = collect(decoder, sequences, SEARCH_ROWS if alpha is None else 0, progress)
    for layer in tqdm(decoder.layers, desc="quantising", unit="layer", disable=not progress, leave=False):
        used = smooth_layer(layer, stats[layer.index], alpha)
        log.debug("layer %d: alpha %s", layer.index, used)
        for name in SMOOTHED:
            setattr(layer, name, W8A8Linear.from_full(getattr(layer, name)))
        stats[layer.index].clear()
    if lm_head:  # a tied embedding keeps its own full-precision weight
        decoder.lm_head = W8A8Linear.from_full(decoder.lm_head)


def quantize_int4(decoder: Decoder, linear: type[W4A16Linear], progress: bool = False) -> None:
    """Turns an unpacked full-precision decoder into W4A16 or W4A4 (the class of its linear layers) in place:
    Hadamard rotation, then int4 weights, layer by layer. Needs no calibration.

    lm_head, embedding and norms stay in full precision, rotated.
    """
    online = rotate_decoder(decoder)
    for layer in tqdm(decoder.layers, desc="quantising", unit="layer", disable=not progress, leave=False):
        for name in SMOOTHED:
            full = getattr(layer, name)
            setattr(layer, name, linear.from_full(full, online if name == "down" else None))
