"""Tokens as clients see them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from quasar.models.model import ASSETS
from quasar.models.tokenizer import load_tokenizer
from quasar.server.tokens import TokenTexts


def test_the_tokens_of_a_tokenizer_that_transformers_made(tmp_path: Path) -> None:
    """Its attribute `backend` is a name, and no tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny-qwen3" / name, tmp_path / name)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "NoSuchTokenizer"}))
    ours, theirs = TokenTexts(load_tokenizer(ASSETS / "tiny-qwen3")), TokenTexts(load_tokenizer(tmp_path))
    assert [theirs.bytes_of(token) for token in range(900)] == [ours.bytes_of(token) for token in range(900)]
