"""A model that can be talked to: decoder, tokenizer, stop ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasar.backends import get_backend
from quasar.backends.base import Backend
from quasar.errors import QuasarError
from quasar.models.build import WeightSource, assemble, precision_of
from quasar.models.chat import render_chat
from quasar.models.config import DTYPES, DUMMY_SHAPES, ModelConfig
from quasar.models.decoder import Decoder
from quasar.models.fidelity import Fidelity
from quasar.models.find import ASSETS, DEFAULT_MODEL, find_checkpoint
from quasar.models.loader import CheckpointWeights, RandomTensors
from quasar.models.opening import open_parts
from quasar.models.runtime import Runtime
from quasar.models.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ASSETS",
    "DEFAULT_MODEL",
    "DUMMY_PREFIX",
    "LoadOptions",
    "Model",
    "dummy_config",
    "find_checkpoint",
    "load_checkpoint",
    "load_tokenizer",
]

DUMMY_PREFIX = "dummy:"
MOST_CHARACTERS = 4 << 20  # of a prompt, as of a request to the server: tokenizing takes a hundred bytes for each


@dataclass
class Model:
    """What `generate` needs. `tokenizer` is None for random weights, and for checkpoints that bring none: those take
    and give token ids only."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None
    stop_ids: frozenset[int]
    precision: str = "full"
    fidelity: Fidelity | None = None  # set by quantisation
    full: Decoder | None = None  # the full-precision decoder that lossless generation confirms with
    weights: WeightSource | None = None  # what a full-precision decoder was built from, for quantising; read anew
    draft_runtimes: dict[str, Runtime] = field(default_factory=dict)  # that draft for this one, by --draft name
    trust_remote_code: bool = False  # whether a draft model's tokenizer may be Python code too

    lock: threading.RLock = field(default_factory=threading.RLock)  # for whatever a first use makes
    _runtimes: dict[Decoder, Runtime] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def runtime(self) -> Runtime:
        """What runs the decoder, made at first use."""
        return self._runtime_of(self.decoder)

    def target_runtime(self, lossless: bool) -> Runtime:
        """Of the decoder whose output it is: this one, or with lossless the full-precision one behind it."""
        if not lossless:
            return self.runtime
        if self.precision == "full":
            raise QuasarError("--lossless confirms what a quantised model says; --precision full already is lossless")
        if self.full is None:
            raise QuasarError("--lossless needs the full-precision weights too; load with lossless=True")
        return self._runtime_of(self.full)

    def with_decoder(self, decoder: Decoder, precision: str) -> Model:
        """The same model around another decoder, with nothing made yet."""
        return Model(
            self.name,
            decoder,
            self.tokenizer,
            self.stop_ids,
            precision,
            self.fidelity,
            trust_remote_code=self.trust_remote_code,
        )

    def _runtime_of(self, decoder: Decoder) -> Runtime:
        with self.lock:
            if decoder not in self._runtimes:
                self._runtimes[decoder] = Runtime(decoder)
            return self._runtimes[decoder]

    def encode(self, text: str, chat: bool = False, system: str | None = None, think: str | None = None) -> list[int]:
        """Token ids of a prompt; chat puts it into the model's chat template as a user turn.

        system is the turn before it, think one of "slow", "fast" and "auto" (see `render_chat`); both go with chat.
        """
        if self.tokenizer is None:
            raise QuasarError(f"{self.name} has no tokenizer; give token ids, as --prompt-ids 1,2,3")
        if len(text) > MOST_CHARACTERS:
            raise QuasarError(f"a prompt of {len(text)} characters is too long; at most {MOST_CHARACTERS}")
        if chat:
            turns = [] if system is None else [{"role": "system", "content": system}]
            return render_chat(self.tokenizer, [*turns, {"role": "user", "content": text}], think=think)
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; their numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is put on a device."""

    device: str = "auto"
    dtype: str = "auto"  # of activations: auto, bfloat16, float16, float32
    trust_remote_code: bool = False
    progress: bool = False
    kv: str = "auto"  # what keys and values are kept in: auto, float32, bfloat16, int8

    def backend(self) -> Backend:
        """The device; QuasarError where it is unknown or absent."""
        return get_backend(self.device, _dtype(self.dtype), self.kv)


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found and checked, and whose weights are read when they are asked for."""

    name: str
    config: ModelConfig
    weights: CheckpointWeights
    backend: Backend
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None
    stop_ids: frozenset[int]
    is_quantized: bool
    nbytes: int
    files: tuple[Path, ...] = ()  # that config and weights were read from; none for random weights
    trust_remote_code: bool = False

    def decoder(self, progress: bool = False) -> Decoder:
        """Puts every layer on the device, one after the other. Raises QuasarError for a checkpoint that does not fit
        its configuration, and where the device's memory does not suffice."""
        self.backend.require_memory(self.nbytes, f"loading {self.name}")
        decoder = assemble(self.config, self.weights, self.backend, progress)
        self.weights.finish()
        return decoder

    def model(self, decoder: Decoder) -> Model:
        """The model around a decoder of these weights."""
        precision = precision_of(decoder)
        return Model(
            self.name,
            decoder,
            self.tokenizer,
            self.stop_ids,
            precision=precision,
            weights=None if self.is_quantized else self.weights,
            trust_remote_code=self.trust_remote_code,
        )


def open_model(name: str, options: LoadOptions) -> Checkpoint:
    """Finds a model: a folder, a shipped model, `dummy:SHAPE`, or a hub name. No layer is read yet."""
    backend = options.backend()
    if name.startswith(DUMMY_PREFIX):
        config = dummy_config(name.removeprefix(DUMMY_PREFIX))
        weights = CheckpointWeights(config, RandomTensors(config.dtype, place=backend.place), backend.place)
        nbytes = config.matrix_parameters * config.dtype.itemsize
        return Checkpoint(name, config, weights, backend, None, frozenset(), is_quantized=False, nbytes=nbytes)
    folder = find_checkpoint(name, options.trust_remote_code)
    # Blocks of a GGUF file: exactly what they stand for where float32 was asked for.
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    opened = open_parts(folder, options.trust_remote_code, dtype)
    return Checkpoint(
        name,
        opened.config,
        CheckpointWeights(opened.config, opened.source, backend.place),
        backend,
        opened.tokenizer,
        opened.stop_ids,
        is_quantized=opened.source.is_quantized,
        nbytes=opened.source.nbytes,
        files=opened.files,
        trust_remote_code=options.trust_remote_code,
    )


def load_checkpoint(name: str, options: LoadOptions) -> Model:
    """A model in its checkpoint's precision. `name` is a folder, a shipped model, `dummy:SHAPE`, or a hub name."""
    found = open_model(name, options)
    return found.model(found.decoder(options.progress))


def dummy_config(shape: str) -> ModelConfig:
    """A named shape for random weights."""
    if shape not in DUMMY_SHAPES:
        raise QuasarError(f"--dummy {shape} is unknown; use one of {', '.join(DUMMY_SHAPES)}")
    return DUMMY_SHAPES[shape]


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise QuasarError(f"--dtype {name} is unknown; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
