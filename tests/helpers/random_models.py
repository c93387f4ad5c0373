"""Small random models in every precision, for tests of what holds whatever the weights are."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

from quasar import Model
from quasar.backends import get_backend
from quasar.backends.base import Backend
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.weights import ModelWeights
from quasar.loading import quantize
from quasar.models.build import assemble
from quasar.models.config import read_config
from quasar.models.loader import CheckpointWeights
from tests.conftest import random_transformer, save_checkpoint


def random_model(
    family: str,
    precision: str = "full",
    keep_full: bool = False,
    seed: int = 0,
    backend: Backend | None = None,
    **sizes: int,
) -> Model:
    """A fresh random model without a tokenizer. Its weights are six times their usual size: with those, logits are
    nearly flat, and no precision or layer makes a difference that a test could see."""
    sizes = {"vocab_size": 160, "num_hidden_layers": 4, "max_position_embeddings": 400} | sizes
    transformer = random_transformer(family, seed=seed, **sizes)
    for parameter in transformer.parameters():
        if parameter.dim() == 2:
            parameter.data *= 6
    backend = backend or ReferenceBackend()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(transformer, Path(folder))
        config = read_config(Path(folder))
        weights = in_memory(CheckpointWeights(config, open_checkpoint(Path(folder)), backend.place))
    decoder = assemble(config, weights, backend)
    model = Model(f"random-{family}", decoder, None, frozenset(), weights=weights)
    if precision != "full":
        quantize(model, precision=precision, keep_full=keep_full)
    return model


def in_memory(weights: CheckpointWeights) -> ModelWeights:
    """What a checkpoint's folder holds, so that the folder may go."""
    table = weights.embedding().clone()
    layers = [weights.layer(index) for index in range(weights.config.num_layers)]
    return ModelWeights(table, copy.deepcopy(layers), copy.deepcopy(weights.head(table)))


@cache
def shared_random_model(family: str, precision: str = "full", device: str = "reference") -> Model:
    """The same with its full-precision weights kept, made once. Do not change it."""
    return random_model(family, precision, keep_full=precision != "full", backend=get_backend(device))
