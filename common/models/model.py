"""A model that can be talked to: decoder, tokenizer, stop ids; and where models are found."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasar.backends import get_backend
from quasar.backends.base import Backend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.folder import SafetensorsFolder, read_json
from quasar.errors import QuasarError
from quasar.models.build import WeightSource, assemble, precision_of
from quasar.models.chat import render_chat
from quasar.models.config import DTYPES, DUMMY_SHAPES, ModelConfig, read_config
from quasar.models.decoder import Decoder
from quasar.models.fidelity import Fidelity
from quasar.models.loader import CheckpointWeights, RandomTensors
from quasar.models.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT_MODEL = "tiny-qwen3"
DUMMY_PREFIX = "dummy:"


@dataclass
class Model:
    """What `generate` needs. `tokenizer` is None for random weights: those take and give token ids only."""

    name: str
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
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
            raise QuasarError(f"{self.name} has random weights and no tokenizer; give --prompt-ids 1,2,3")
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
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: frozenset[int]
    is_quantized: bool
    nbytes: int
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
    config = read_config(folder)
    source = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    return Checkpoint(
        name,
        config,
        CheckpointWeights(config, source, backend.place),
        backend,
        tokenizer,
        _stop_ids(folder, tokenizer),
        is_quantized=source.format != SafetensorsFolder.format,
        nbytes=source.nbytes,
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


def find_checkpoint(name: str, trust_remote_code: bool = False) -> Path:
    """The folder that `name` means; downloads a hub repository (organisation/name) through huggingface_hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if (ASSETS / name / "config.json").exists():
        return ASSETS / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        shipped = ", ".join(sorted(path.parent.name for path in ASSETS.glob("*/config.json")))
        raise QuasarError(f"--model {name}: no such folder; shipped models are {shipped}, hub models organisation/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuasarError(f"--model {name}: not a folder here, and not to be had from the hub ({reason})") from None


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder; QuasarError where there is none that can be used."""
    from transformers import AutoTokenizer  # takes seconds to import
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    # It warns that it has no such model as PanguEmbedded: only the tokenizer is asked for.
    transformers_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions on files that it cannot parse
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise QuasarError(
                f"{folder}: the tokenizer is Python code in the checkpoint; read it, then give --trust-remote-code"
            ) from None
        raise QuasarError(f"{folder}: no usable tokenizer ({reason})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """From generation_config.json, else config.json; and the tokenizer's own end token."""
    ids: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        if not ids and (folder / file).exists():
            value = read_json(folder / file).get("eos_token_id")
            ids.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise QuasarError(f"--dtype {name} is unknown; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
