"""What an output must look like: JSON, a JSON schema, a tool call. Compiled by llguidance, followed token by token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from quasar.server.errors import ApiError
from quasar.server.tokens import backend_of

# Enough for schemas of a few hundred fields; a schema that needs more gets an error instead of the server's time.
MAX_SCHEMA_BYTES = 128 * 1024
MAX_SCHEMA_DEPTH = 64
_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}
_OBJECT = {"type": "object"}
# White space as json.dumps writes it: a model cannot lose itself in line breaks, and more tokens are forced. A schema
# says otherwise under "x-guidance".
_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


class Grammars:
    """Makes the grammars of one model's requests."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.stop_ids = sorted(stop_ids)
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json_object(self) -> str:
        """Any JSON object."""
        return LLMatcher.grammar_from_json_schema(_OBJECT, defaults=_SPACING)

    def json_schema(self, schema: dict[str, Any], param: str) -> str:
        """JSON that a schema describes; ApiError names `param` where the schema is none, or too large."""
        _check_schema(schema, param)
        return self._checked(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACING), param)

    def tool_calls(self, tools: Sequence[tuple[str, dict[str, Any] | None]], several: bool) -> str:
        """A hermes call of one of the tools (name, schema of its arguments), or several calls."""
        kinds = []
        for name, schema in tools:
            if schema is not None:
                _check_schema(schema, "tools")
            fields = {"name": {"const": name}, "arguments": schema or _OBJECT}
            kinds.append(
                {
                    "type": "object",
                    "properties": fields,
                    "required": list(fields),
                    "additionalProperties": False,
                    "x-guidance": _SPACING,
                }
            )
        names = [f"call{i}" for i in range(len(kinds))]
        rules = [f"{name}: %json {json.dumps(kind)}" for name, kind in zip(names, kinds, strict=True)]
        repeat = r' ("\n" call)*' if several else ""
        lark = [f"start: call{repeat}", r'call: "<tool_call>\n" one "\n</tool_call>"', f"one: {' | '.join(names)}"]
        return self._checked(LLMatcher.grammar_from_lark("\n".join([*lark, *rules])), "tools")

    def matcher(self, grammar: str, thinking: tuple[int, int] | None = None, inside: bool = False) -> TokenGrammar:
        """A grammar's state at the beginning of an output.

        thinking: ids of the markers between which a model may think first; inside: the prompt opened them.
        """
        state = TokenGrammar(self._matcher(grammar), self._vocabulary, self.stop_ids)
        return state if thinking is None else AfterThinking(state, *thinking, inside)

    def _checked(self, grammar: str, param: str) -> str:
        error = self._matcher(grammar).get_error()
        if error:
            raise ApiError(f"'{param}': the schema cannot be followed: {error.splitlines()[0][:300]}", param=param)
        return grammar

    def _matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._ll_tokenizer(), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))

    def _ll_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                backend = backend_of(self._tokenizer)
                try:
                    if backend is None:
                        raise ValueError("it is Python code")
                    size = max(self._vocabulary, backend.get_vocab_size(with_added_tokens=True))
                    self._made = LLTokenizer(backend.to_str(), size, self.stop_ids or None)
                except Exception as error:  # llguidance raises what it finds
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise ApiError(
                        f"'response_format': this model's tokenizer cannot follow grammars ({reason})"
                    ) from None
            return self._made


class TokenGrammar:
    """A grammar and the tokens it has taken: what the engine asks for each token and each draft. It never raises:
    where no token fits any more, it lets the output end."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, stop_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stop_ids = list(stop_ids)
        self._taken: list[bool] = []  # whether the matcher took a token: it does not take end tokens

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_error() or self._matcher.is_stopped()

    def allowed(self) -> Tensor | None:
        """bool [vocabulary] of the tokens that may come next."""
        if self.finished:
            return self._ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
        if self._matcher.is_error():  # a limit was reached
            return self._ends()
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        allowed[: len(mask)] = torch.from_numpy(mask).bool()
        return allowed if bool(allowed.any()) else self._ends()

    def advance(self, token: int) -> None:
        """Takes the token that came."""
        takes = not self.finished and token not in self._stop_ids
        self._taken.append(takes)
        if takes:
            self._matcher.consume_token(token)

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens back."""
        if count:
            taken = sum(self._taken[-count:])
            del self._taken[-count:]
            if taken:
                self._matcher.rollback(taken)

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as they are certain."""
        return [] if self.finished else self._matcher.compute_ff_tokens()

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow one another from here. The state stays."""
        tokens = list(tokens)
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        if self.finished:
            return min(1, len(tokens)) if end == 0 else 0
        valid = self._matcher.validate_tokens(tokens[:end]) if end else 0
        if valid == end < len(tokens) and self._may_end_after(tokens[:end]):
            return end + 1
        return valid

    def _may_end_after(self, tokens: list[int]) -> bool:
        if not tokens:
            return self._matcher.is_accepting()
        self._matcher.consume_tokens(tokens)
        accepting = self._matcher.is_accepting()
        self._matcher.rollback(len(tokens))
        return accepting

    def _ends(self) -> Tensor | None:
        if not self._stop_ids:
            return None
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        allowed[self._stop_ids] = True
        return allowed


class AfterThinking:
    """A grammar of the answer only: free while the model thinks."""

    def __init__(self, grammar: TokenGrammar, start: int, end: int, inside: bool) -> None:
        self._grammar = grammar
        self._start = start
        self._end = end
        self._states = ["thinking" if inside else "start"]  # after each token, for taking back

    @property
    def finished(self) -> bool:
        return self._states[-1] != "thinking" and self._grammar.finished

    def allowed(self) -> Tensor | None:
        if self._states[-1] == "thinking":
            return None
        allowed = self._grammar.allowed()
        if self._states[-1] == "start" and allowed is not None:
            allowed[self._start] = True
        return allowed

    def advance(self, token: int) -> None:
        self._states.append(self._after(self._states[-1], token))
        if self._states[-1] == "answer" and self._states[-2] != "thinking":
            self._grammar.advance(token)

    def rollback(self, count: int) -> None:
        for _ in range(count):
            if self._states.pop() == "answer" and self._states[-1] != "thinking":
                self._grammar.rollback(1)

    def forced(self) -> list[int]:
        return self._grammar.forced() if self._states[-1] == "answer" else []

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        state = self._states[-1]
        for i, token in enumerate(tokens):
            after = self._after(state, token)
            if after == "answer" and state != "thinking":
                return i + self._grammar.valid_prefix(tokens[i:])
            state = after
        return len(tokens)

    def _after(self, state: str, token: int) -> str:
        if state == "start":
            return "thinking" if token == self._start else "answer"
        if state == "thinking":
            return "answer" if token == self._end else "thinking"
        return state


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ApiError(f"'{param}': the schema is nested deeper than {MAX_SCHEMA_DEPTH}", param=param)
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ApiError(f"'{param}': the schema is larger than {MAX_SCHEMA_BYTES} bytes", param=param)


def _depth(value: Any) -> int:
    """Nesting, without recursion: the value comes from a request."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        below: list[Any] = []
        for item in level:
            below += item.values() if isinstance(item, Mapping) else item if isinstance(item, list) else ()
        level = below
    return deepest
