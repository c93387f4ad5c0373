"""/v1/messages, in Anthropic's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.serving import Live

TOOLS = [{"name": "weather", "input_schema": {"type": "object"}}]
TEXT = '<think>\nHm.\n</think>\n\nI look. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


def wish(**more: Any) -> dict[str, Any]:
    return {"model": "tiny-qwen3", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], **more}


def test_a_message(live: Live) -> None:
    answer = live.post("/v1/messages", wish(max_tokens=5, temperature=0.0, system="Be brief."))
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert answer["content"][0]["type"] == "text"
    usage = answer["usage"]
    counted = live.post(
        "/v1/messages/count_tokens", {k: v for k, v in wish(system="Be brief.").items() if k != "max_tokens"}
    )
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert usage["output_tokens"] == 5


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_blocks(script: Callable[..., Live], batch: int) -> None:
    server = script(TEXT, batch=batch)
    answer = server.post("/v1/messages", wish(tools=TOOLS))
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][2]["input"] == {"city": "Bonn"}
    assert answer["stop_reason"] == "tool_use"
    events = server.stream("/v1/messages", wish(tools=TOOLS))
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events][-2:] == ["message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({"type": event["content_block"]["type"], "said": ""})
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            blocks[event["index"]]["said"] += (
                delta.get("text") or delta.get("thinking") or delta.get("partial_json", "")
            )
    assert blocks == [
        {"type": "thinking", "said": "Hm."},
        {"type": "text", "said": "I look."},
        {"type": "tool_use", "said": '{"city": "Bonn"}'},
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_stop_sequence_is_told(script: Callable[..., Live]) -> None:
    answer = script("one two three").post("/v1/messages", wish(stop_sequences=["x", " two"]))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", " two")
    assert answer["content"] == [{"type": "text", "text": "one"}]


def test_a_conversation_with_tools(script: Callable[..., Live]) -> None:
    server = script("Dry.")
    blocks = [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
    ]
    result = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "dry"}]},
        {"type": "text", "text": "So?"},
    ]
    turns = [*wish()["messages"], {"role": "assistant", "content": blocks}, {"role": "user", "content": result}]
    answer = server.post("/v1/messages", wish(messages=turns, tools=TOOLS))
    assert answer["content"][0]["text"] == "Dry."
    assert answer["stop_reason"] == "end_turn"
    prompt = server.model.tokenizer.decode(server.engine.handles[-1].prompt)
    assert "Bonn" in prompt
    assert prompt.index("dry") < prompt.index("So?")


def test_errors_are_anthropics(live: Live) -> None:
    status, _, body = live.request("POST", "/v1/messages", wish(temperature=1.5))
    assert status == 400
    assert b'"type":"error"' in body
    error = live.error("/v1/messages", wish(temperature=1.5))
    assert error["type"] == "invalid_request_error"
    assert "temperature" in error["message"]
    assert "max_tokens" in live.error("/v1/messages", {k: v for k, v in wish().items() if k != "max_tokens"})["message"]


def test_the_anthropic_package(live: Live) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**wish(max_tokens=5))
        assert answer.stop_reason == "max_tokens"
        with client.messages.stream(**wish(max_tokens=5)) as stream:
            assert stream.get_final_message().usage.output_tokens == 5
