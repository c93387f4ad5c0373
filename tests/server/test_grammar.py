"""Grammars followed token by token, forwards and back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from quasar import Model
from quasar.server.errors import ApiError
from quasar.server.grammar import AfterThinking, Grammars, TokenGrammar

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["first", "second"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(shipped: Callable[..., Model]) -> Grammars:
    model = shipped("qwen3")
    return Grammars(model.tokenizer, model.config.vocab_size, model.stop_ids)


def text_of(model: Model, state: TokenGrammar | AfterThinking, seed: int, most: int = 60) -> str:
    """Random tokens that the grammar allows, up to the end token."""
    dice, ids = random.Random(seed), []
    for _ in range(most):
        allowed = state.allowed().nonzero().flatten().tolist()
        token = dice.choice(allowed)
        assert state.valid_prefix([token]) == 1
        state.advance(token)
        if token in model.stop_ids:
            return model.decode(ids)
        ids.append(token)
    return model.decode(ids)


def test_random_outputs_are_what_the_schema_says(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    text = grammars.json_schema(SCHEMA, "response_format")
    for seed in range(10):
        value = json.loads(text_of(shipped("qwen3"), grammars.matcher(text), seed))
        assert value["kind"] in ("first", "second")
        assert len(value["name"]) <= 8


def test_taking_back_is_as_if_it_had_not_been(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    model = shipped("qwen3")
    state = grammars.matcher(grammars.json_schema(SCHEMA, "x"))
    ids = [*model.encode('{"name": "Bob", "kind": "first"}'), min(model.stop_ids)]
    masks = []
    for token in ids:
        masks.append(state.allowed().clone())
        state.advance(token)
    assert state.finished
    for mask, token in zip(reversed(masks), reversed(ids), strict=True):
        state.rollback(1)
        assert bool((state.allowed() == mask).all())
        assert bool(mask[token])


def test_forced_tokens_follow_from_the_schema_alone(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    model = shipped("qwen3")
    schema = {
        "type": "object",
        "properties": {"a": {"const": "always this"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    state = grammars.matcher(grammars.json_schema(schema, "x"))
    forced = state.forced()
    assert forced
    assert state.valid_prefix(forced) == len(forced)
    for token in forced:
        assert state.allowed()[token]
        state.advance(token)
    assert model.decode(forced).startswith("{")


def test_drafts_are_cut_where_the_grammar_forbids(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    model = shipped("qwen3")
    state = grammars.matcher(grammars.json_schema(SCHEMA, "x"))
    good, bad = model.encode('{"name": "Bob"'), model.encode(', "other"')
    end = min(model.stop_ids)
    assert state.valid_prefix([*good, *bad]) < len(good) + len(bad)
    assert state.valid_prefix([*good, end]) == len(good)
    whole = model.encode('{"name": "Bob", "kind": "first"}')
    assert state.valid_prefix([*whole, end, end]) == len(whole) + 1
    assert state.valid_prefix(whole) == len(whole), "the question changed the state"


def test_it_never_raises(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    """openvino.genai 4081: the end token in a draft, and tokens after it, crashed a grammar."""
    ends = sorted(shipped("qwen3").stop_ids)
    state = grammars.matcher(grammars.json_object())
    state.advance(4000)  # forbidden
    assert state.allowed().nonzero().flatten().tolist() == ends
    state.advance(ends[0])
    assert state.forced() == []
    assert state.valid_prefix([5, 6]) == 0
    state.advance(17)
    assert state.finished


def test_thinking_is_free_and_the_answer_is_not(grammars: Grammars) -> None:
    text = grammars.json_object()
    start, end = 500, 501
    state = grammars.matcher(text, (start, end))
    assert state.allowed()[start]
    assert int(state.allowed().sum()) > 1
    brace = next(i for i in state.allowed().nonzero().flatten().tolist() if i != start)
    assert state.valid_prefix([start, 7, 8, end, brace]) == 5
    assert state.valid_prefix([start, 7, end, 7]) == 3
    for token in (start, 7, 8):
        state.advance(token)
        assert state.allowed() is None
    state.advance(end)
    assert not state.allowed()[7]
    state.advance(brace)
    state.rollback(2)
    assert state.allowed() is None
    inside = grammars.matcher(text, (start, end), inside=True)
    assert inside.allowed() is None


def test_calls_of_tools(grammars: Grammars, shipped: Callable[..., Model]) -> None:
    tools = [("add", {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]})]
    tools += [("now", None)]
    said = text_of(shipped("qwen3"), grammars.matcher(grammars.tool_calls(tools, several=False)), 3, 400)
    assert said.startswith('<tool_call>\n{"name": "')


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nope"}, "nope"),
        ({"$ref": "http://example.org/schema"}, "cannot be followed"),
        ({"$ref": "file:///etc/passwd"}, "cannot be followed"),
        ({"pattern": "((("}, "cannot be followed"),
        ({"enum": ["x" * 200_000]}, "larger than"),
    ],
)
def test_bad_schemas_name_the_parameter(grammars: Grammars, schema: dict[str, object], says: str) -> None:
    with pytest.raises(ApiError, match=says) as raised:
        grammars.json_schema(schema, "response_format")
    assert raised.value.param == "response_format"


def test_deep_schemas_are_refused(grammars: Grammars) -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="nested deeper"):
        grammars.json_schema(schema, "response_format")


def test_a_schema_that_explodes_ends(grammars: Grammars) -> None:
    """A pattern whose automaton has more states than memory: it is refused, or its output ends early."""
    schema = {"type": "string", "pattern": "^(a|b)*a(a|b){60}$"}
    try:
        state = grammars.matcher(grammars.json_schema(schema, "response_format"))
    except ApiError:
        return
    dice = random.Random(0)
    for _ in range(80):
        state.advance(dice.choice(state.allowed().nonzero().flatten().tolist()))
