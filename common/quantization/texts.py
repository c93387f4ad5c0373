"""What models are calibrated on and measured with: built-in code and conversations, or the user's own texts.

The built-in conversations are SmolLM2's own, sampled: a small model's, wrong in many facts, and natural to any model.
Those to measure on are on other questions. A model with a chat template gets them in that template; one without gets
code alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from quasar.models.chat import render_chat
from quasar.models.config import ModelConfig
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import

TEXT_TOKENS = 512  # of each calibration text
CALIBRATION_TOKENS = 3072  # of all built-in ones together
_SMALL = 50e6  # parameters: such a model is measured on four times the tokens in the same time


def calibration_and_heldout(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | None = None,
    heldout: Sequence[str] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the texts to calibrate on and to measure on, None meaning the built-in ones."""
    limit = min(TEXT_TOKENS, config.max_position_embeddings)
    calibration: list[list[int]] = []
    tokens = 0
    for ids in map(tokenizer.encode, prompts) if prompts else built_in(tokenizer, "calibration"):
        if not prompts and tokens >= CALIBRATION_TOKENS:
            break
        if ids:
            calibration.append(ids[:limit])
            tokens += len(calibration[-1])
    own = heldout_texts(tokenizer, heldout)
    most = 4096 if heldout or config.matrix_parameters < _SMALL else 1536
    return calibration, held_out(own, config.vocab_size, config.max_position_embeddings, most)


def heldout_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None) -> Iterable[list[int]]:
    """Token ids of the texts to measure on, None meaning the built-in ones."""
    return map(tokenizer.encode, texts) if texts else built_in(tokenizer, "heldout")


def built_in(tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[int]]:
    """Token ids of the built-in "calibration" or "heldout" texts: code, and for chat models conversations, in turn."""
    code = map(tokenizer.encode, read_texts(ASSETS / f"{name}.jsonl"))
    chats = conversations(tokenizer, ASSETS / f"{name}_chat.jsonl") if tokenizer.chat_template else ()
    for pair in zip_longest(chats, code):
        yield from (ids for ids in pair if ids is not None)


def conversations(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[list[int]]:
    """Token ids of a JSONL file's `messages`, in the model's chat template, answers included."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return (render_chat(tokenizer, row["messages"], add_generation_prompt=False) for row in rows)
