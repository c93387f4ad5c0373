"""Tokens as clients see them: their text, their bytes, their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from quasar.engine.settings import TokenEvent

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class TokenTexts:
    """The bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
        backend = backend_of(tokenizer)
        self._byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
        self._added = frozenset(backend.get_added_tokens_decoder()) if backend is not None else frozenset()
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def is_special(self, token: int) -> bool:
        """Whether it is left out of text."""
        return token in self._special

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", "replace")

    def _bytes_of(self, token: int) -> bytes:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return f"{token} ".encode()
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if token in self._added or not self._byte_level:
            text = name if token in self._added else tokenizer.decode([token])
            return text.encode("utf-8", "replace")
        alphabet = _byte_alphabet()
        return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in name)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers` object within a tokenizer, ours or transformers'; None where it is made of Python code."""
    return getattr(tokenizer, "backend_tokenizer", None)


class LogprobHold:
    """Tokens with log-probabilities, held back until their text is certain: none lies past a stop string."""

    def __init__(self, texts: TokenTexts, ends: Iterable[int]) -> None:
        self._texts = texts
        self._ends = frozenset(ends)
        self._held: list[tuple[int, TokenEvent]] = []
        self._decoded = self._certain = 0  # bytes of text

    def push(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """Takes tokens; returns those whose text has begun to be certain."""
        for event in events:
            if event.token_id is not None:
                self._held.append((self._decoded, event))
                special = self._texts.is_special(event.token_id)
                self._decoded += 0 if special else len(self._texts.bytes_of(event.token_id))
            self._certain += len(event.text.encode("utf-8", "replace"))
        ready = 0
        while ready < len(self._held) and self._held[ready][0] < self._certain:
            ready += 1
        out = [event for _, event in self._held[:ready]]
        del self._held[:ready]
        return out

    def finish(self, at_stop_string: bool) -> list[TokenEvent]:
        """No more tokens: the rest without the end token, and without what a stop string cut off."""
        rest = [] if at_stop_string else [event for _, event in self._held if event.token_id not in self._ends]
        self._held = []
        return rest


def chat_logprob(event: TokenEvent, texts: TokenTexts) -> dict[str, Any]:
    """An entry of `logprobs.content`."""
    best = event.top_logprobs or ()
    return _entry(event.token_id, event.logprob, texts) | {
        "top_logprobs": [_entry(token, logprob, texts) for token, logprob in best]
    }


def _entry(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    raw = texts.bytes_of(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float | None) -> float:
    return _LEAST if logprob is None or not logprob > _LEAST else float(logprob)


def completion_logprobs(
    tokens: Iterable[tuple[int, float | None, list[tuple[int, float]] | None]], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """The `logprobs` of /v1/completions for (token, log-probability, best alternatives); offset: characters before."""
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, best in tokens:
        text = texts.text_of(token)
        out["tokens"].append(text)
        out["token_logprobs"].append(None if logprob is None else finite(logprob))
        top = None if best is None else {texts.text_of(t): finite(p) for t, p in reversed(best)}
        out["top_logprobs"].append(None if top is None else dict(reversed(top.items())) | {text: finite(logprob)})
        out["text_offset"].append(offset)
        offset += len(text)
    return out
