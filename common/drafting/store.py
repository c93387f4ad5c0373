"""`--draft-store DIR`: the corpus on disk.

DIR/store.json names the format and the tokenizer. DIR/tokens.bin holds one record for each sequence: its length and the
CRC of its tokens, then the tokens, all as little-endian 32-bit integers. A record is appended in one write, so a crash
leaves at most the last one torn, and the next start cuts that off. DIR/lock is held while a process uses the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from quasar.drafting.corpus import MOST_TOKENS, Corpus
from quasar.errors import QuasarError
from quasar.locking import lock
from quasar.reading import parse_json

_FORMAT = 1
_HEAD = struct.Struct("<II")  # tokens, CRC-32 of their bytes
_log = logging.getLogger(__name__)


def tokenizer_fingerprint(tokenizer: Any, vocab_size: int) -> str:
    """The same for tokenizers that number tokens alike. tokenizer: None for a model of random weights."""
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    return hashlib.sha256(json.dumps([vocab_size, vocabulary]).encode()).hexdigest()[:32]


class CorpusStore(Corpus):
    """A corpus that keeps every sequence in a folder, and the latest `most_tokens` of them."""

    def __init__(self, folder: str | Path, fingerprint: str, vocab_size: int, most_tokens: int = MOST_TOKENS) -> None:
        """Reads the folder, or makes it. Raises QuasarError where it is corrupt, another tokenizer's, or in use."""
        super().__init__(most_tokens)
        self._folder = Path(folder).expanduser()
        self._vocab_size = vocab_size
        self._file: IO[bytes] | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self._folder / "lock").open("a+b")
            try:
                in_use = "is in use by another process or engine; name another folder, or end that one"
                lock(self._lock_file, f"--draft-store {self._folder}: {in_use}")
                self._check(fingerprint)
                self._read()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise QuasarError(f"--draft-store {folder}: cannot be used ({error})") from None

    def add(self, tokens: Sequence[int]) -> None:
        """Takes a finished sequence into the queue and the file. A full disk stops the writing, not the generating."""
        super().add(tokens)
        if self._file is None or not tokens:
            return
        try:
            self._file.write(_record(tokens))
            self._stored += len(tokens)
            if self._stored > 2 * self._most:
                self._shorten()
        except OSError as error:
            _log.warning("--draft-store %s: cannot be written (%s); goes on without", self._folder, error)
            self.close()

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock_file.close()

    def __enter__(self) -> CorpusStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _path(self) -> Path:
        return self._folder / "tokens.bin"

    def _check(self, fingerprint: str) -> None:
        """Writes store.json, or compares it."""
        path = self._folder / "store.json"
        if not path.exists():
            if self._path.exists():
                raise QuasarError(f"--draft-store {self._folder}: {path} is missing; name an empty folder")
            _replace(path, json.dumps({"format": _FORMAT, "tokenizer": fingerprint}).encode() + b"\n")
            return
        try:
            about = parse_json(path.read_text(encoding="utf-8"))
            known, tokenizer = about["format"], about["tokenizer"]
        except (ValueError, KeyError, TypeError):
            raise QuasarError(f"--draft-store {self._folder}: {path} is corrupt; name another folder") from None
        if known != _FORMAT:
            raise QuasarError(f"--draft-store {self._folder}: {path} has format {known}; this version reads {_FORMAT}")
        if tokenizer != fingerprint:
            raise QuasarError(
                f"--draft-store {self._folder}: was written with another tokenizer; name a folder for this model's"
            )

    def _read(self) -> None:
        self._file = self._path.open("a+b", buffering=0)
        self._file.seek(0)
        content = self._file.read()
        whole, records = 0, []
        for tokens, end in self._records(content):
            records.append(tokens)
            whole = end
        if whole < len(content):
            self._file.truncate(whole)
        self._stored = sum(map(len, records))
        kept, first = 0, len(records)
        while first and kept + len(records[first - 1]) <= self._most:
            first -= 1
            kept += len(records[first])
        for tokens in records[first:]:
            super().add(tokens)
        self.work()

    def _records(self, content: bytes) -> Iterator[tuple[list[int], int]]:
        """Tokens and end of each whole record. Raises QuasarError for damage that is not a torn last record."""
        at = 0
        while at + _HEAD.size <= len(content):
            count, crc = _HEAD.unpack_from(content, at)
            end = at + _HEAD.size + 4 * count
            if end > len(content):
                break
            payload = content[at + _HEAD.size : end]
            tokens = _ids(payload)
            if zlib.crc32(payload) != crc or not tokens or max(tokens) >= self._vocab_size:
                if end == len(content):
                    break
                raise self._corrupt(at)
            yield tokens, end
            at = end
        if at < len(content) and (self._lost_length(content[at:])):
            raise self._corrupt(at)

    def _corrupt(self, at: int) -> QuasarError:
        where = f"{self._path} is corrupt at byte {at}"
        return QuasarError(f"--draft-store {self._folder}: {where}; delete the folder, or name another")

    def _lost_length(self, rest: bytes) -> bool:
        """Whether what is left cannot be a record that a crash cut short."""
        if len(rest) < _HEAD.size:
            return False
        given = _ids(rest[_HEAD.size : len(rest) - (len(rest) - _HEAD.size) % 4])
        return any(token >= self._vocab_size for token in given)

    def _shorten(self) -> None:
        """Keeps the latest sequences of `most_tokens` tokens; the old file stays whole until the new one is."""
        records = [tokens for tokens, _ in self._records(self._path.read_bytes())]
        kept: list[list[int]] = []
        stored = 0
        for tokens in reversed(records):
            if stored + len(tokens) > self._most:
                break
            kept.append(tokens)
            stored += len(tokens)
        _replace(self._path, b"".join(map(_record, reversed(kept))))
        if self._file is not None:
            self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self._stored = stored


def _record(tokens: Sequence[int]) -> bytes:
    payload = struct.pack(f"<{len(tokens)}I", *tokens)
    return _HEAD.pack(len(tokens), zlib.crc32(payload)) + payload


def _ids(payload: bytes) -> list[int]:
    ids = array("I", payload)
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        ids.byteswap()
    return ids.tolist()


def _replace(path: Path, content: bytes) -> None:
    """Writes a file that is either the old or the new one, whatever happens."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
