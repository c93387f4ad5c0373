"""Models of random weights in every precision that is measured, made on the card in seconds.

What a recipe would calibrate and round by GPTQ, which takes minutes at 8B, is rounded to the nearest here: a pass costs
the same.
"""

from __future__ import annotations

from quasar import Model
from quasar.backends.base import Backend
from quasar.models.build import assemble
from quasar.models.loader import CheckpointWeights, RandomTensors
from quasar.models.model import DUMMY_PREFIX, dummy_config
from quasar.quantization.methods import W8A8, Int4, Method
from quasar.quantization.recipe import DEFAULT_RECIPE
from quasar.quantization.stream import quantized_decoder

SCHEMES = (
    "full",
    "w8a8",  # as the recipe has it: wide inputs before qkv and down
    "w8a8, int8 inputs throughout",
    "w8a8, int8 lm_head",
    "w4a16",  # as on every device with zero points: groups of 32
    "w4a16, symmetric groups of 128",
)


def random_model(shape: str, scheme: str, backend: Backend) -> Model:
    """A model of this shape in one of SCHEMES."""
    config = dummy_config(shape)
    weights = CheckpointWeights(config, RandomTensors(config.dtype, place=backend.place), backend.place)
    precision = scheme.partition(",")[0]
    if precision == "full":
        decoder = assemble(config, weights, backend)
    else:
        if precision == "w8a8":
            wide = () if "int8 inputs" in scheme else DEFAULT_RECIPE.wide
            method: Method = W8A8(config, smooth=False, wide=wide)
        elif "symmetric" in scheme:
            method = Int4(config)
        else:
            method = Int4(config, group=32, symmetric=False)
        texts = [list(range(min(16, config.vocab_size)))]  # seen, and not used
        lm_head = "w8a8" if "int8 lm_head" in scheme else "full"
        decoder, _ = quantized_decoder(config, weights, backend, method, texts, lm_head=lm_head)
    return Model(f"{DUMMY_PREFIX}{shape}", decoder, None, frozenset(), precision)
