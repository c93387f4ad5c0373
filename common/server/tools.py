"""Tool calls in hermes style, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, read as they are written."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolDelta:
    """A piece of a call. The first of a call has its id and name; arguments are pieces of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Feed it text in any pieces; it returns plain text (str) and pieces of calls (ToolDelta).

    The same text gives the same calls however it is cut. Text that is no call after all comes back as text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""  # maybe the beginning of a marker
        self._blank = ""  # white space that is dropped where a call follows
        self._call: _Call | None = None

    def push(self, text: str) -> list[str | ToolDelta]:
        out: list[str | ToolDelta] = []
        pending, self._held = self._held + text, ""
        while pending:
            if self._call is None:
                pending = self._text(pending, out)
            else:
                pending = self._call.push(pending, out)
                if self._call.closed:
                    self._end_call()
                elif self._call.keeps:  # the beginning of a closing marker, maybe
                    self._held = pending
                    break
        return out

    def finish(self) -> list[str | ToolDelta]:
        """No more text."""
        out: list[str | ToolDelta] = []
        if self._call is not None:
            self._call.finish(self._held, out)
            self._end_call()
        elif self._held or not self.calls:
            out += [self._blank + self._held] if self._blank + self._held else []
        self._held = self._blank = ""
        return out

    def _end_call(self) -> None:
        self.calls += self._call.named
        self._call = None

    def _text(self, pending: str, out: list[str | ToolDelta]) -> str:
        """Takes text up to a call, or all of it."""
        at = pending.find(OPEN)
        keep = held_length(pending, OPEN) if at < 0 else 0
        plain = pending[:at] if at >= 0 else pending[: len(pending) - keep]
        plain = self._blank + plain
        body = plain.rstrip()
        self._blank = plain[len(body) :]
        if body:
            out.append(body)
        if at < 0:
            self._held = pending[len(pending) - keep :]
            return ""
        self._call = _Call(self.calls, self._blank)
        self._blank = ""
        return pending[at + len(OPEN) :]


class _Call:
    """One call's JSON, character by character."""

    def __init__(self, index: int, blank: str) -> None:
        self.index = index
        self.named = False
        self.closed = False
        self.keeps = False
        self._blank = blank
        self._raw = ""
        self._state = "open"  # open key colon value comma done broken
        self._token = ""  # the key or value that is being read
        self._key = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._arguments = ""  # of a call that has not said its name yet
        self._said_arguments = False

    def push(self, text: str, out: list[str | ToolDelta]) -> str:
        """Takes text; returns what follows the call, or may be the beginning of its closing marker."""
        self.keeps = False
        piece = ""
        for i, char in enumerate(text):
            if self._state in ("done", "broken"):
                self._piece(piece, out)
                return self._after(text[i:], out)
            self._raw += char
            piece += self._step(char)
        self._piece(piece, out)
        return ""

    def finish(self, held: str, out: list[str | ToolDelta]) -> None:
        """The text ended within the call: what was not said as a call is said as text."""
        if not self.named:
            out.append(self._blank + OPEN + self._raw + held)
        elif self._state == "done" and not self._said_arguments:
            out.append(ToolDelta(self.index, arguments="{}"))
        self.closed = True

    def _after(self, text: str, out: list[str | ToolDelta]) -> str:
        at = text.find(CLOSE)
        if at < 0:
            keep = held_length(text, CLOSE)
            self._raw += text[: len(text) - keep]
            self.keeps = True
            if not keep:
                return ""
            return text[len(text) - keep :]
        self._raw += text[:at] + CLOSE
        if self.named and not self._said_arguments:
            out.append(ToolDelta(self.index, arguments="{}"))
        if not self.named:
            out.append(self._blank + OPEN + self._raw)
        self.closed = True
        return text[at + len(CLOSE) :]

    def _piece(self, piece: str, out: list[str | ToolDelta]) -> None:
        """Says the name as soon as it is known, then arguments as they come."""
        self._arguments += piece
        if not self.named and self._name:
            self.named = True
            out.append(ToolDelta(self.index, new_id("call_"), self._name))
        if self.named and self._arguments:
            out.append(ToolDelta(self.index, arguments=self._arguments))
            self._said_arguments = True
            self._arguments = ""

    _name = ""

    def _step(self, char: str) -> str:
        """One character; returns what of it belongs to the arguments' text."""
        state = self._state
        if state == "value":
            return self._value(char)
        if state == "key":
            self._token += char
            if self._ends_string(char):
                self._key, self._token, self._state = _decoded(self._token), "", "colon"
        elif char.isspace():
            pass
        elif state == "open" and char == "{":
            self._state = "comma"
        elif state == "comma" and char == '"':
            self._token, self._state, self._in_string = char, "key", True
        elif state == "comma" and char == ",":
            pass
        elif state == "comma" and char == "}":
            self._state = "done"
        elif state == "colon" and char == ":":
            self._state, self._depth, self._token = "value", 0, ""
        else:
            self._state = "broken"
        return ""

    def _value(self, char: str) -> str:
        streams = self._key in ("arguments", "parameters")
        if not self._token and not self._in_string and char.isspace():
            return ""
        if self._in_string:
            self._token += char
            ended = self._ends_string(char)
            if ended and self._depth == 0:
                return self._end_value(streams)
            return char if streams and not self._is_string() else ""
        if self._depth == 0 and char in ",}":  # after a number, true, null
            rest = self._end_value(False)
            self._state = "done" if char == "}" else "comma"
            return rest
        self._token += char
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end_value(False)
        return char if streams and not self._is_string() else ""

    def _is_string(self) -> bool:
        return self._token.startswith('"')

    def _end_value(self, streams: bool) -> str:
        token, self._token, self._state = self._token, "", "comma"
        if self._key == "name":
            self._name = _decoded(token)
        return _decoded(token) if streams else ""  # arguments that were written as a string of JSON

    def _ends_string(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"' and len(self._token) > 1:
            self._in_string = False
            return True
        return False


def held_length(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which `marker` begins."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


def _decoded(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:24]
