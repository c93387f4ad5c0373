"""Quasar: draft tokens almost for free, verify them in one pass of the same model in W8A8.

from common import load, quantize, generate
model = load("tiny-qwen3", precision="w8a8")
for piece in generate(model, "def main():"):
    print(piece, end="", flush=True)
"""

from common.errors import QuasarError
from common.generation import Generation, GenerationSettings, GenerationStats, Result, generate
from common.loading import load, quantize
from common.models.model import Model

__all__ = [
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
