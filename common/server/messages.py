"""/v1/messages: Anthropic's interface."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from quasar.server import protocol
from quasar.server.generate import Choice, Request
from quasar.server.http import event_bytes
from quasar.server.service import Service
from quasar.server.tools import ToolDelta, new_id

_STOPS = {"length": "max_tokens", "tool_calls": "tool_use"}


async def prompt_of(service: Service, body: protocol.CountTokensRequest) -> list[int]:
    """Token ids of a conversation. Raises ApiError."""
    service.check_model(body.model)
    effort = "none" if body.thinking is not None and body.thinking.type == "disabled" else None
    prompt = await service.render(_messages(body), _tools(body), None, effort)
    service.check_length(prompt, "messages")
    return prompt


async def prepare(service: Service, body: protocol.MessagesRequest) -> Request:
    """The one choice of a request, not yet started. Raises ApiError."""
    service.jobs.check_room(1)
    prompt = await prompt_of(service, body)
    tools, choice_of_tool, grammar = _tools(body), body.tool_choice, None
    if tools and choice_of_tool is not None and choice_of_tool.type in ("any", "tool"):
        functions = [
            (tool.function.name, tool.function.parameters)
            for tool in tools
            if choice_of_tool.type == "any" or tool.function.name == choice_of_tool.name
        ]
        several = choice_of_tool.type == "any" and not choice_of_tool.disable_parallel_tool_use
        grammar = (await service.matchers("tool_calls", (functions, several), prompt, 1, "tools"))[0]
    wishes = protocol.Sampling(
        temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences
    )
    more = {"seed": service.seeds(None, 1)[0], "grammar": grammar, "logprobs": None}
    choice = Choice(service, 0, prompt, service.settings(wishes, prompt, body.max_tokens, **more))
    choice.parser = service.parser(prompt, bool(tools))
    return Request(service, [choice])


def _tools(body: protocol.CountTokensRequest) -> list[protocol.Tool]:
    if body.tool_choice is not None and body.tool_choice.type == "none":
        return []
    return [
        protocol.Tool(
            type="function",
            function=protocol.Function(name=t.name, description=t.description, parameters=t.input_schema),
        )
        for t in body.tools or ()
    ]


def _messages(body: protocol.CountTokensRequest) -> list[protocol.Message]:
    """The conversation as chat messages: results of tools are messages of their own there."""
    out: list[protocol.Message] = []
    if body.system:
        system = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system)
        out.append(protocol.Message(role="system", content=system))
    for message in body.messages:
        if isinstance(message.content, str):
            out.append(protocol.Message(role=message.role, content=message.content))
            continue
        text, calls, thinking = "", [], ""
        for block in message.content:
            if isinstance(block, protocol.TextBlock):
                text += block.text
            elif isinstance(block, protocol.ThinkingBlock):
                thinking += block.thinking
            elif isinstance(block, protocol.ToolUseBlock):
                function = protocol.CalledFunction(
                    name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)
                )
                calls.append(protocol.ToolCall(id=block.id, function=function))
            else:
                content = block.content or ""
                result = content if isinstance(content, str) else "".join(part.text for part in content)
                out.append(protocol.Message(role="tool", content=result, tool_call_id=block.tool_use_id))
        if text or calls or thinking:
            more = {"tool_calls": calls or None, "reasoning_content": thinking or None}
            out.append(protocol.Message(role=message.role, content=text, **more))
    return out


class MessagesResponse:
    """The answer as a message object, whole or as events."""

    def __init__(self, service: Service, body: protocol.MessagesRequest, request: Request) -> None:
        self._service = service
        self._request = request
        self._id = new_id("msg_")

    async def whole(self) -> dict[str, Any]:
        await self._request.finish()
        choice = self._request.choices[0]
        answer, content = choice.answer, []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.content:
            content.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
        return self._message(content) | _stop(choice) | {"usage": self._usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events up to message_stop."""
        choice = self._request.choices[0]
        begin = {"input_tokens": len(choice.prompt), "output_tokens": 0}
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None, "usage": begin}
        yield _event("message_start", message=message)
        index, kind_open = -1, None
        steps = self._request.steps()
        try:
            async for step in steps:
                for kind, what in step.pieces.parts:
                    begins = isinstance(what, ToolDelta) and what.id is not None
                    if kind != kind_open or begins:
                        if kind_open is not None:
                            yield _event("content_block_stop", index=index)
                        index, kind_open = index + 1, kind
                        yield _event("content_block_start", index=index, content_block=_empty(kind, what))
                    if not isinstance(what, ToolDelta) or what.arguments:
                        yield _event("content_block_delta", index=index, delta=_delta(kind, what))
        finally:
            await steps.aclose()
        if kind_open is not None:
            yield _event("content_block_stop", index=index)
        yield _event("message_delta", delta=_stop(choice), usage=self._usage())
        yield _event("message_stop")

    def _message(self, content: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._service.name,
            "content": list(content),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._request.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


def _event(kind: str, **fields: Any) -> bytes:
    return event_bytes({"type": kind, **fields}, kind)


def _stop(choice: Choice) -> dict[str, Any]:
    assert choice.job is not None and choice.job.result is not None
    matched = choice.job.result.stop_reason
    if isinstance(matched, str) and choice.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": _STOPS.get(choice.finish_reason or "", "end_turn"), "stop_sequence": None}


def _empty(kind: str, what: str | ToolDelta) -> dict[str, Any]:
    if isinstance(what, ToolDelta):
        return {"type": "tool_use", "id": what.id, "name": what.name, "input": {}}
    return (
        {"type": "thinking", "thinking": "", "signature": ""} if kind == "reasoning" else {"type": "text", "text": ""}
    )


def _delta(kind: str, what: str | ToolDelta) -> dict[str, Any]:
    if isinstance(what, ToolDelta):
        return {"type": "input_json_delta", "partial_json": what.arguments}
    if kind == "reasoning":
        return {"type": "thinking_delta", "thinking": what}
    return {"type": "text_delta", "text": what}


def _input(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
