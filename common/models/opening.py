"""The one place that decides whether a checkpoint runs: everything short of reading its weights.

`load` goes on from here to read them; `quasar inspect` puts them on the meta device, where tensors have shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import GGUFSource, SafetensorsFolder, open_checkpoint
from quasar.models.config import ModelConfig, read_config
from quasar.models.decoder import Decoder
from quasar.models.loader import TensorSource, build_decoder
from quasar.models.tokenizer import Tokenizer, load_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A folder or GGUF file whose every part but the weights has been read and checked."""

    path: Path
    config: ModelConfig
    source: SafetensorsFolder | GGUFSource
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None
    stop_ids: frozenset[int]

    @property
    def files(self) -> tuple[Path, ...]:
        """What config and weights are read from."""
        if isinstance(self.source, GGUFSource):
            return (self.path,)
        return (self.path / "config.json", *sorted(set(self.source.files.values())))


def check_shapes(config: ModelConfig, source: TensorSource) -> Decoder:
    """Builds the decoder on the meta device, where tensors have shapes and no values: all that loading checks, without
    the reading. Raises QuasarError where names or shapes do not fit the configuration."""
    if isinstance(source, GGUFSource):
        source = source.shapes()
    return build_decoder(config, source, ReferenceBackend("meta", config.dtype))


def open_parts(path: Path, trust_remote_code: bool = False, dtype: torch.dtype = torch.bfloat16) -> OpenedCheckpoint:
    """Opens a folder or GGUF file; dtype is what blocks of a GGUF file become. Raises QuasarError, in one line, on
    whatever Quasar cannot run."""
    config = read_config(path)
    source = open_checkpoint(path, dtype)
    tokenizer = load_tokenizer(path, trust_remote_code)
    return OpenedCheckpoint(path, config, source, tokenizer, stop_ids(path, tokenizer))
