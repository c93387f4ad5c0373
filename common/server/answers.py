"""An answer as it grows: tokens in, pieces of thinking, text and tool calls out."""

from __future__ import annotations

from dataclasses import dataclass, field

from quasar.models.chat import ReasoningSplitter
from quasar.server.tools import ToolCallParser, ToolDelta


@dataclass
class Pieces:
    """What became certain with some tokens, in order; neighbours of one kind are joined."""

    parts: list[tuple[str, str | ToolDelta]] = field(default_factory=list)  # ("reasoning" | "content" | "tool", what)

    def add(self, kind: str, what: str | ToolDelta) -> None:
        if self.parts and self.parts[-1][0] == kind:
            last = self.parts[-1][1]
            if isinstance(what, str):
                self.parts[-1] = (kind, last + what)
                return
            if last.index == what.index and what.id is None:
                joined = ToolDelta(last.index, last.id, last.name, last.arguments + what.arguments)
                self.parts[-1] = (kind, joined)
                return
        self.parts.append((kind, what))

    def extend(self, other: Pieces) -> None:
        for kind, what in other.parts:
            self.add(kind, what)


class AnswerParser:
    """Thinking first, then the answer, where tool calls are read if the request brought tools."""

    def __init__(self, splitter: ReasoningSplitter, tools: bool) -> None:
        self._splitter = splitter
        self._tools = ToolCallParser() if tools else None
        self._thinking = False
        self.reasoning_tokens = 0

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._tools is not None and self._tools.calls > 0

    def push(self, text: str) -> Pieces:
        """Takes the text that became certain with a token."""
        split = self._splitter.push(text)
        if split:
            self._thinking = split[-1][0] == "reasoning"
        self.reasoning_tokens += self._thinking or any(kind == "reasoning" for kind, _ in split)
        return self._pieces(split)

    def finish(self) -> Pieces:
        pieces = self._pieces(self._splitter.finish())
        for part in self._tools.finish() if self._tools is not None else ():
            pieces.add("tool" if isinstance(part, ToolDelta) else "content", part)
        return pieces

    def _pieces(self, split: list[tuple[str, str]]) -> Pieces:
        pieces = Pieces()
        for kind, text in split:
            if kind == "reasoning":
                pieces.add("reasoning", text)
            elif self._tools is None:
                pieces.add("content", text)
            else:
                for part in self._tools.push(text):
                    pieces.add("tool" if isinstance(part, ToolDelta) else "content", part)
        return pieces


@dataclass
class Answer:
    """A whole answer, gathered from its pieces."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolDelta] = field(default_factory=list)

    def take(self, pieces: Pieces) -> None:
        for kind, what in pieces.parts:
            if kind == "reasoning":
                self.reasoning += what
            elif kind == "content":
                self.content += what
            elif what.id is not None:
                self.calls.append(what)
            else:
                call = self.calls[-1]
                self.calls[-1] = ToolDelta(call.index, call.id, call.name, call.arguments + what.arguments)
