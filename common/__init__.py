"""Quasar: draft tokens almost for free, verify them in one pass of the same model in W8A8.

In Python:

    from quasar import load, quantize, generate
    model = load("tiny-qwen3", precision="w8a8")
    for piece in generate(model, "def main():"):
        print(piece, end="", flush=True)
"""

import os

# libgomp's threads spin at the end of every parallel region; beside any other busy process that makes each of torch's
# and our small operations wait for a scheduler slice (measured: a pass of 15 ms took 1.8 s). It reads this when loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from quasar.engine.engine import Engine
from quasar.errors import QuasarError
from quasar.generation import Generation, GenerationSettings, GenerationStats, Result, generate
from quasar.loading import load, quantize
from quasar.models.model import Model

__all__ = [
    "Engine",
    "Generation",
    "GenerationSettings",
    "GenerationStats",
    "Model",
    "QuasarError",
    "Result",
    "generate",
    "load",
    "quantize",
]
