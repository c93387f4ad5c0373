"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from quasar.server import protocol
from quasar.server.answers import Pieces
from quasar.server.errors import ApiError
from quasar.server.generate import Choice, Request, Step
from quasar.server.http import DONE, event_bytes
from quasar.server.service import Service
from quasar.server.tokens import chat_logprob
from quasar.server.tools import ToolDelta, new_id


async def prepare(service: Service, body: protocol.ChatRequest) -> Request:
    """The choices of a chat request, not yet started. Raises ApiError."""
    service.check_model(body.model)
    count = body.n or 1
    service.jobs.check_room(count)
    tools = list(body.tools or ()) if body.tool_choice != "none" else []
    options: dict[str, Any] = {}
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    prompt = await service.render(body.messages, tools, body.chat_template_kwargs, body.reasoning_effort, **options)
    service.check_length(prompt, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = body.max_completion_tokens or body.max_tokens
    grammars = await _grammars(service, body, tools, prompt, count)
    seeds = service.seeds(body.seed, count)
    choices = []
    for i in range(count):
        more = {"seed": seeds[i], "logprobs": logprobs, "grammar": grammars[i]}
        choice = Choice(service, i, prompt, service.settings(body, prompt, most, **more))
        choice.parser = service.parser(prompt, bool(tools))
        choices.append(choice)
    return Request(service, choices)


async def _grammars(
    service: Service, body: protocol.ChatRequest, tools: Sequence[protocol.Tool], prompt: Sequence[int], count: int
) -> Sequence[Any]:
    """What each choice must follow; None where it is free."""
    form, choice = body.response_format, body.tool_choice
    is_free = form is None or isinstance(form, protocol.TextFormat)
    if choice not in (None, "none", "auto"):
        if not is_free:
            raise ApiError("response_format does not go with a tool_choice that must call", param="response_format")
        wanted = choice.function.name if isinstance(choice, protocol.NamedTool) else None
        functions = [tool.function for tool in tools if wanted in (None, tool.function.name)]
        several = body.parallel_tool_calls is not False and wanted is None
        what = [(function.name, function.parameters) for function in functions], several
        return await service.matchers("tool_calls", what, prompt, count, "tools")
    return await format_grammars(service, form, prompt, count, "response_format")


async def format_grammars(service: Service, form: Any, prompt: Sequence[int], count: int, param: str) -> Sequence[Any]:
    """Of a response_format."""
    if form is None or isinstance(form, protocol.TextFormat):
        return [None] * count
    if isinstance(form, protocol.JsonObjectFormat):
        return await service.matchers("json_object", None, prompt, count, param)
    schema = form.json_schema.schema_ if isinstance(form, protocol.JsonSchemaFormat) else form.schema_
    return await service.matchers("json_schema", schema, prompt, count, param)


class ChatResponse:
    """A request's answer in OpenAI's shape, whole or as chunks."""

    def __init__(self, service: Service, body: protocol.ChatRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())
        self._reasons = body.include_reasoning is not False

    async def whole(self) -> dict[str, Any]:
        await self._request.finish()
        body = self._head("chat.completion") | {
            "choices": [self._choice(choice) for choice in self._request.choices],
            "usage": self._request.usage(),
        }
        job = self._request.jobs[0]
        if self._body.return_metrics:
            body["metrics"] = self._service.speculation(job)
        if self._body.timings_per_token:
            body["timings"] = self._service.timings(job)
        return body

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        answer = choice.answer
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in answer.calls
            ]
        if answer.reasoning and self._reasons:
            message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
        message["refusal"] = None
        out: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.scored),
            "finish_reason": choice.finish_reason,
        }
        if self._body.return_pieces:
            out["pieces"] = choice.origins
        if self._body.return_token_ids:
            out["token_ids"] = choice.token_ids
        return out

    def _logprobs(self, scored: Sequence[Any]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [chat_logprob(event, self._service.texts) for event in scored], "refusal": None}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events up to [DONE]."""
        options = self._body.stream_options or protocol.StreamOptions()
        head = self._head("chat.completion.chunk")
        if options.include_usage:
            head["usage"] = None
        begun: set[int] = set()
        steps = self._request.steps()
        try:
            async for step in steps:
                choice = step.choice
                if choice.index not in begun:
                    begun.add(choice.index)
                    yield self._chunk(head, choice, {"role": "assistant", "content": ""}, None)
                for piece in self._deltas(step):
                    extra = {"usage": self._request.usage()} if options.continuous_usage_stats else {}
                    yield self._chunk(head | extra, choice, *piece)
        finally:
            await steps.aclose()
        if options.include_usage:
            last = head | {"choices": [], "usage": self._request.usage()}
            yield event_bytes(last | self._figures())
        elif figures := self._figures():
            yield event_bytes(head | {"choices": []} | figures)
        yield DONE

    def _figures(self) -> dict[str, Any]:
        job = self._request.jobs[0]
        figures = {}
        if self._body.return_metrics:
            figures["metrics"] = self._service.speculation(job)
        if self._body.timings_per_token:
            figures["timings"] = self._service.timings(job)
        return figures

    def _deltas(self, step: Step) -> list[tuple[dict[str, Any], Step | None, str | None]]:
        """(delta, step whose extras go with it, finish reason) of each chunk."""
        deltas = self._delta_objects(step.pieces)
        out: list[tuple[dict[str, Any], Step | None, str | None]] = [(delta, None, None) for delta in deltas]
        wants_more = step.scored or (self._body.return_token_ids and step.tokens) or step.finish_reason is not None
        if not out and wants_more:
            out = [({}, None, None)]
        if out:
            out[-1] = (out[-1][0], step, None)
        if step.finish_reason is not None:
            if out[-1][0]:
                out.append(({}, None, step.finish_reason))
            else:
                out[-1] = (out[-1][0], out[-1][1], step.finish_reason)
        return out

    def _delta_objects(self, pieces: Pieces) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for kind, what in pieces.parts:
            if isinstance(what, ToolDelta):
                deltas.append({"tool_calls": [_tool_delta(what)]})
            elif kind == "content":
                deltas.append({"content": what})
            elif self._reasons:
                deltas.append({"reasoning_content": what, "reasoning": what})
        return deltas

    def _chunk(
        self, head: dict[str, Any], choice: Choice, delta: dict[str, Any], step: Step | None, reason: str | None = None
    ) -> bytes:
        out: dict[str, Any] = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if step is not None:
            if self._body.logprobs and step.scored:
                out["logprobs"] = self._logprobs(step.scored)
            if self._body.return_pieces:
                out["pieces"] = step.origins
            if self._body.return_token_ids:
                out["token_ids"] = [event.token_id for event in step.tokens]
        chunk = head | {"choices": [out]}
        if step is not None and self._body.timings_per_token and choice.job is not None:
            chunk["timings"] = self._service.timings(choice.job)
        return event_bytes(chunk)


def _tool_delta(delta: ToolDelta) -> dict[str, Any]:
    function = {"arguments": delta.arguments}
    if delta.id is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name} | function}
