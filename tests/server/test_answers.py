"""Thinking, text and tool calls, however the text is cut."""

from __future__ import annotations

import json
import random

import pytest

from quasar.models.chat import QWEN3, ReasoningSplitter
from quasar.server.answers import Answer, AnswerParser

CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "K\\u00f6ln", '
    '"note": "a } \\" </tool_call> {"}}\n</tool_call>'
)
WHOLE = f"<think>\nIs it raining?\n</think>\n\nLet me look.\n{CALL}\n{CALL}"


def read(pieces: list[str], thinks: bool = True, tools: bool = True) -> Answer:
    parser, answer = AnswerParser(ReasoningSplitter(QWEN3 if thinks else None), tools), Answer()
    for piece in pieces:
        answer.take(parser.push(piece))
    answer.take(parser.finish())
    assert parser.called == bool(answer.calls)
    return answer


def cuts(text: str, seed: int) -> list[str]:
    dice = random.Random(seed)
    places = sorted(dice.sample(range(1, len(text)), dice.randint(1, min(40, len(text) - 1))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("pieces", [[WHOLE], list(WHOLE), *(cuts(WHOLE, seed) for seed in range(30))])
def test_the_same_answer_however_it_is_cut(pieces: list[str]) -> None:
    answer = read(pieces)
    assert answer.reasoning == "Is it raining?"
    assert answer.content == "Let me look."
    assert [call.name for call in answer.calls] == ["weather"] * 2
    assert json.loads(answer.calls[1].arguments) == {"city": "Köln", "note": 'a } " </tool_call> {'}
    assert [call.index for call in answer.calls] == [0, 1]
    assert len({call.id for call in answer.calls}) == 2


def test_arguments_are_streamed_as_they_come() -> None:
    parser = AnswerParser(ReasoningSplitter(None), tools=True)
    said = []
    for char in '<tool_call>{"name": "f", "arguments": {"text": "abc"}}</tool_call>':
        said += [what.arguments for kind, what in parser.push(char).parts if kind == "tool"]
    assert len(said) > 10
    assert "".join(said) == '{"text": "abc"}'


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        ('{"arguments": {"a": [1, {"b": "}"}]}, "name": "f"}', "f", '{"a": [1, {"b": "}"}]}'),
        ('{"name": "f"}', "f", "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "f", '{"a": 1}'),
        ('{"name":"f","parameters":{},"id":7}', "f", "{}"),
        ('{"other": null, "name": "f", "arguments": {"x": true}}', "f", '{"x": true}'),
    ],
)
def test_forms_of_calls(call: str, name: str, arguments: str) -> None:
    for pieces in (["<tool_call>", call, "</tool_call>"], list(f"<tool_call>{call}</tool_call>")):
        answer = read(pieces, thinks=False)
        assert [(c.name, c.arguments) for c in answer.calls] == [(name, arguments)]
        assert answer.content == ""


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not json</tool_call> and more",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 5',
        "a < b and <tool_cal",
        "<tool_call>",
        "  \n ",
        "text with a trailing break\n",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    for pieces in ([text], list(text)):
        answer = read(pieces, thinks=False)
        assert answer.calls == []
        assert answer.content == text


def test_a_call_that_the_limit_cut_keeps_what_was_said() -> None:
    answer = read(list('<tool_call>{"name": "f", "arguments": {"a": "lo'), thinks=False)
    assert [(c.name, c.arguments) for c in answer.calls] == [("f", '{"a": "lo')]


def test_without_tools_calls_are_text() -> None:
    assert read([CALL], tools=False).content == CALL
