"""The shipped models with one and the same set of weights on any backend, quantised once on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from quasar import Model, load
from quasar.backends.base import Backend
from quasar.quantization.methods import W8A8
from quasar.quantization.stream import quantized_decoder
from tests.conftest import TINY
from tests.helpers.moving import make_static, moved

CALIBRATION = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
PRECISIONS = ("full", "w8a8")


@cache
def master(family: str, precision: str) -> Model:
    """On the reference backend in float32: "full", "w8a8" or "w8a8-static". Its weights are what the others get."""
    model = load(TINY[family], device="reference", precision="full")
    if precision == "full":
        return model
    ids = model.encode(CALIBRATION)
    model.decoder, _ = quantized_decoder(
        model.config, model.weights, model.decoder.backend, W8A8(model.config), calibration=[ids]
    )
    if precision == "w8a8-static":
        make_static(model.decoder, ids)
    return model


def on_backend(family: str, precision: str, backend: Backend) -> Model:
    """The same model on another backend."""
    model = master(family, precision)
    return replace(model, decoder=moved(model.decoder, backend))
