"""The `openai` package as a client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.serving import Live

openai = pytest.importorskip("openai")

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
HELLO = [{"role": "user", "content": "Hi"}]


def client_of(server: Live, **how: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **how)


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with client_of(live) as client:
        yield client


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny-qwen3", messages=HELLO, max_completion_tokens=6, logprobs=True, top_logprobs=2, seed=1, n=2
    )
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert [model.id for model in client.models.list()] == ["tiny-qwen3"]


def test_streams(client: Any) -> None:
    told = {"model": "tiny-qwen3", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**told).choices[0].message.content
    with client.chat.completions.create(**told, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[-1].usage.completion_tokens == 12


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="tiny-qwen3", prompt="def main():", max_tokens=5, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("def main():")


def test_a_json_schema(client: Any) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        sure: bool
        word: str = pydantic.Field(max_length=5)

    answer = client.chat.completions.parse(
        model="tiny-qwen3", messages=HELLO, response_format=Answer, max_tokens=200, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed.sure, bool)


def test_tools(script: Callable[..., Live]) -> None:
    with client_of(script(CALL)) as client:
        told = {"model": "tiny-qwen3", "messages": HELLO, "tools": TOOLS}
        message = client.chat.completions.create(**told).choices[0].message
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Bonn"}
        with client.chat.completions.stream(**told) as stream:
            final = stream.get_final_completion()
        assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"city": "Bonn"}
        assert final.choices[0].finish_reason == "tool_calls"
        history = [
            *HELLO,
            message.model_dump(),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "dry"},
        ]
        assert client.chat.completions.create(model="tiny-qwen3", messages=history, tools=TOOLS).choices


def test_a_tool_that_must_be_called(client: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("lamp", "fan")]
    choice = {"type": "function", "function": {"name": "fan"}}
    answer = client.chat.completions.create(
        model="tiny-qwen3", messages=HELLO, tools=tools, tool_choice=choice, max_tokens=80, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "fan"
    assert isinstance(json.loads(call.function.arguments)["on"], bool)


def test_errors(client: Any, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny-qwen3", messages=HELLO, temperature=9)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(model="tiny-qwen3", messages=HELLO, extra_body={"nonsense": 1})


def test_responses(client: Any, script: Callable[..., Live]) -> None:
    answer = client.responses.create(model="tiny-qwen3", input="Hi", max_output_tokens=6, temperature=0)
    assert answer.status == "incomplete"
    assert answer.usage.output_tokens == 6
    with client.responses.create(
        model="tiny-qwen3", input="Hi", max_output_tokens=6, temperature=0, stream=True
    ) as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == answer.output_text
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
    with client_of(script(f"<think>\nHm.\n</think>\n\n{CALL}", batch=2)) as other:
        told = {"model": "tiny-qwen3", "input": "Hi", "tools": tools}
        whole = other.responses.create(**told)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        with other.responses.stream(**told) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert json.loads(final.output[2].arguments) == {"city": "Bonn"}
        history = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in whole.output]]
        history.append({"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "dry"})
        assert other.responses.create(model="tiny-qwen3", input=history, tools=tools).status == "completed"
