"""/v1/responses: OpenAI's newer interface, for text and function calls. Responses are not stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from quasar.server import protocol
from quasar.server.answers import Answer
from quasar.server.chat import format_grammars
from quasar.server.generate import Choice, Request
from quasar.server.http import event_bytes
from quasar.server.service import Service
from quasar.server.tokens import chat_logprob
from quasar.server.tools import ToolDelta, new_id


async def prepare(service: Service, body: protocol.ResponsesRequest) -> Request:
    """The one choice of a request, not yet started. Raises ApiError."""
    service.check_model(body.model)
    service.jobs.check_room(1)
    tools = _tools(body) if body.tool_choice != "none" else []
    effort = body.reasoning.effort if body.reasoning is not None else None
    prompt = await service.render(_messages(body), tools, body.chat_template_kwargs, effort)
    service.check_length(prompt, "input")
    if tools and body.tool_choice not in (None, "auto"):
        wanted = body.tool_choice.name if isinstance(body.tool_choice, protocol.ResponseNamedTool) else None
        functions = [(t.function.name, t.function.parameters) for t in tools if wanted in (None, t.function.name)]
        several = body.parallel_tool_calls is not False and wanted is None
        grammars: Sequence[Any] = await service.matchers("tool_calls", (functions, several), prompt, 1, "tools")
    else:
        form = body.text.format if body.text is not None else None
        grammars = await format_grammars(service, form, prompt, 1, "text.format")
    wishes = protocol.Sampling(temperature=body.temperature, top_p=body.top_p)
    logprobs = body.top_logprobs if body.top_logprobs is not None else _wants_logprobs(body)
    more = {"seed": service.seeds(body.seed, 1)[0], "grammar": grammars[0], "logprobs": logprobs}
    choice = Choice(service, 0, prompt, service.settings(wishes, prompt, body.max_output_tokens, **more))
    choice.parser = service.parser(prompt, bool(tools))
    return Request(service, [choice])


def _wants_logprobs(body: protocol.ResponsesRequest) -> int | None:
    return 0 if "message.output_text.logprobs" in (body.include or ()) else None


def _tools(body: protocol.ResponsesRequest) -> list[protocol.Tool]:
    return [
        protocol.Tool(
            type="function",
            function=protocol.Function(
                name=t.name, description=t.description, parameters=t.parameters, strict=t.strict
            ),
        )
        for t in body.tools or ()
    ]


def _messages(body: protocol.ResponsesRequest) -> list[protocol.Message]:
    """The conversation as chat messages."""
    out = [protocol.Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*out, protocol.Message(role="user", content=body.input)]
    for item in body.input:
        if isinstance(item, protocol.InputMessage):
            out.append(protocol.Message(role=item.role, content=item.content))
        elif isinstance(item, protocol.InputFunctionCall):
            function = protocol.CalledFunction(name=item.name, arguments=item.arguments)
            call = protocol.ToolCall(id=item.call_id, function=function)
            if out and out[-1].role == "assistant":
                out[-1].tool_calls = [*(out[-1].tool_calls or ()), call]
            else:
                out.append(protocol.Message(role="assistant", content="", tool_calls=[call]))
        elif isinstance(item, protocol.InputFunctionOutput):
            out.append(protocol.Message(role="tool", content=item.output, tool_call_id=item.call_id))
    return out


class ResponsesResponse:
    """The answer as a response object, whole or as events."""

    def __init__(self, service: Service, body: protocol.ResponsesRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._id = new_id("resp_")
        self._created = int(time.time())
        self._sequence = 0

    async def whole(self) -> dict[str, Any]:
        await self._request.finish()
        choice = self._request.choices[0]
        return self._object(choice, _items(choice.answer, self._service, choice))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events up to response.completed."""
        choice = self._request.choices[0]
        yield self._event("response.created", response=self._object(choice, [], "in_progress"))
        yield self._event("response.in_progress", response=self._object(choice, [], "in_progress"))
        items: list[dict[str, Any]] = []
        open_item: dict[str, Any] | None = None
        steps = self._request.steps()
        try:
            async for step in steps:
                scored = [chat_logprob(event, self._service.texts) for event in step.scored]
                for kind, what in step.pieces.parts:
                    begins = isinstance(what, ToolDelta) and what.id is not None
                    if open_item is None or begins or open_item["type"] != _ITEM_TYPES[kind]:
                        if open_item is not None:
                            for event in self._close(open_item, len(items) - 1):
                                yield event
                        open_item = _new_item(kind, what)
                        items.append(open_item)
                        for event in self._open(open_item, len(items) - 1):
                            yield event
                    yield self._delta(open_item, len(items) - 1, what, scored if kind == "content" else [])
        finally:
            await steps.aclose()
        if open_item is not None:
            for event in self._close(open_item, len(items) - 1):
                yield event
        done = self._object(choice, items)
        yield self._event(f"response.{done['status']}", response=done)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event_bytes(event, kind)

    def _open(self, item: dict[str, Any], index: int) -> list[bytes]:
        empty = item | ({"content": []} if item["type"] != "function_call" else {})
        out = [self._event("response.output_item.added", output_index=index, item=empty)]
        if item["type"] != "function_call":
            part = item["content"][0]
            out.append(self._event("response.content_part.added", **_place(item, index), content_index=0, part=part))
        return out

    def _delta(self, item: dict[str, Any], index: int, what: Any, scored: list[Any]) -> bytes:
        place = _place(item, index)
        if isinstance(what, ToolDelta):
            item["arguments"] += what.arguments
            return self._event("response.function_call_arguments.delta", **place, delta=what.arguments)
        part = item["content"][0]
        part["text"] += what
        if item["type"] == "reasoning":
            return self._event("response.reasoning_text.delta", **place, content_index=0, delta=what)
        part["logprobs"] += scored
        return self._event("response.output_text.delta", **place, content_index=0, delta=what, logprobs=scored)

    def _close(self, item: dict[str, Any], index: int) -> list[bytes]:
        place, out = _place(item, index), []
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            out.append(self._event("response.function_call_arguments.done", **place, **done))
        else:
            part = item["content"][0]
            name, extra = "reasoning_text", {}
            if item["type"] == "message":
                name, extra = "output_text", {"logprobs": part["logprobs"]}
            out.append(self._event(f"response.{name}.done", **place, content_index=0, text=part["text"], **extra))
            out.append(self._event("response.content_part.done", **place, content_index=0, part=part))
        out.append(self._event("response.output_item.done", output_index=index, item=item))
        return out

    def _object(self, choice: Choice, items: list[dict[str, Any]], status: str | None = None) -> dict[str, Any]:
        body = self._body
        cut = choice.finish_reason == "length"
        usage = None
        if status is None:
            counts = self._request.usage()
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
            }
        out = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut and status is None else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.name,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": choice.settings.temperature,
            "text": {"format": _format(body)},
            "tool_choice": body.tool_choice.model_dump()
            if hasattr(body.tool_choice, "model_dump")
            else body.tool_choice or "auto",
            "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools or ()],
            "top_p": choice.settings.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }
        if body.return_metrics and status is None:
            out["metrics"] = self._service.speculation(self._request.jobs[0])
        return out


_ITEM_TYPES = {"reasoning": "reasoning", "content": "message", "tool": "function_call"}


def _format(body: protocol.ResponsesRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _place(item: dict[str, Any], index: int) -> dict[str, Any]:
    return {"item_id": item["id"], "output_index": index}


def _new_item(kind: str, what: str | ToolDelta) -> dict[str, Any]:
    if isinstance(what, ToolDelta):
        head = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress"}
        return head | {"call_id": what.id, "name": what.name, "arguments": ""}
    if kind == "reasoning":
        content = [{"type": "reasoning_text", "text": ""}]
        return {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": content}
    content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    return {"id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": content}


def _items(answer: Answer, service: Service, choice: Choice) -> list[dict[str, Any]]:
    """The finished output."""
    items = []
    if answer.reasoning:
        items.append(_new_item("reasoning", ""))
        items[-1]["content"][0]["text"] = answer.reasoning
    if answer.content or not (answer.calls or answer.reasoning):
        items.append(_new_item("content", ""))
        items[-1]["content"][0] |= {
            "text": answer.content,
            "logprobs": [chat_logprob(event, service.texts) for event in choice.scored],
        }
    for call in answer.calls:
        items.append(_new_item("tool", call))
        items[-1]["arguments"] = call.arguments
    for item in items:
        item["status"] = "completed"
    return items
