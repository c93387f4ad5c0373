"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from quasar.server import protocol
from quasar.server.chat import format_grammars
from quasar.server.errors import ApiError
from quasar.server.generate import Choice, Request
from quasar.server.http import DONE, event_bytes
from quasar.server.scoring import score_prompt
from quasar.server.service import Service
from quasar.server.tokens import completion_logprobs
from quasar.server.tools import new_id

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def prepare(service: Service, body: protocol.CompletionRequest) -> Request:
    """The choices of a completion request, prompt by prompt, not yet started. Raises ApiError."""
    service.check_model(body.model)
    count = body.n or 1
    prompts = await _prompts(service, body)
    service.jobs.check_room(count * len(prompts))
    if body.echo and body.stream and body.logprobs is not None:
        raise ApiError("echo with logprobs is not streamed", param="echo")
    most = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    seeds = service.seeds(body.seed, count)
    choices = []
    for prompt in prompts:
        service.check_length(prompt, "prompt")
        grammars = await format_grammars(service, body.response_format, prompt, count, "response_format")
        for i in range(count):
            more = {"seed": seeds[i], "logprobs": body.logprobs, "grammar": grammars[i]}
            choices.append(Choice(service, len(choices), prompt, service.settings(body, prompt, most, **more)))
    return Request(service, choices)


async def _prompts(service: Service, body: protocol.CompletionRequest) -> list[list[int]]:
    prompt, special = body.prompt, body.add_special_tokens is not False
    if isinstance(prompt, str):
        return [await service.encode(prompt, special)]
    if isinstance(prompt[0], str):
        return [await service.encode(text, special) for text in prompt]  # type: ignore[arg-type]
    if isinstance(prompt[0], int):
        return [list(prompt)]  # type: ignore[arg-type]
    return [list(ids) for ids in prompt]  # type: ignore[union-attr]


class CompletionResponse:
    """A request's answer in OpenAI's shape, whole or as chunks."""

    def __init__(self, service: Service, body: protocol.CompletionRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._id = new_id("cmpl-")
        self._created = int(time.time())
        self._said: dict[int, int] = {}  # characters of each choice

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._service.name}

    async def whole(self) -> dict[str, Any]:
        body = self._body
        scores: dict[int, Any] = {}
        if body.echo and body.logprobs is not None:
            for choice in self._request.choices:
                if id(choice.prompt) not in scores:
                    scores[id(choice.prompt)] = await score_prompt(self._service, choice.prompt, body.logprobs)
        if body.max_tokens == 0:
            choices = [self._prompt_only(choice, scores) for choice in self._request.choices]
        else:
            await self._request.start().finish()
            choices = [self._choice(choice, scores) for choice in self._request.choices]
        out = self._head() | {"choices": choices, "usage": self._request.usage()}
        if self._request.jobs:
            job = self._request.jobs[0]
            if body.return_metrics:
                out["metrics"] = self._service.speculation(job)
            if body.timings_per_token:
                out["timings"] = self._service.timings(job)
        return out

    def _prompt_only(self, choice: Choice, scores: dict[int, Any]) -> dict[str, Any]:
        logprobs = None
        if scores:
            logprobs = completion_logprobs(scores[id(choice.prompt)], self._service.texts, 0)
        text = self._service.decode(choice.prompt)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": "length"}

    def _choice(self, choice: Choice, scores: dict[int, Any]) -> dict[str, Any]:
        echo = self._service.decode(choice.prompt) if self._body.echo else ""
        logprobs = None
        if self._body.logprobs is not None:
            rows = [*scores.get(id(choice.prompt), ()), *_rows(choice.scored)]
            logprobs = completion_logprobs(rows, self._service.texts, 0)
        out = {
            "index": choice.index,
            "text": echo + choice.answer.content,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": None if choice.job is None or choice.job.result is None else choice.job.result.stop_reason,
        }
        if self._body.return_pieces:
            out["pieces"] = choice.origins
        if self._body.return_token_ids:
            out |= {"token_ids": choice.token_ids, "prompt_token_ids": list(choice.prompt)}
        return out

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events up to [DONE]."""
        body = self._body
        options = body.stream_options or protocol.StreamOptions()
        head = self._head()
        if options.include_usage:
            head["usage"] = None
        if body.echo:
            for choice in self._request.choices:
                echo = self._service.decode(choice.prompt)
                yield event_bytes(head | {"choices": [_chunk_choice(choice.index, echo)]})
        steps = self._request.steps()
        try:
            async for step in steps:
                choice, text = step.choice, "".join(t for _, t in step.pieces.parts if isinstance(t, str))
                wanted = text or step.scored or step.finish_reason or (body.return_token_ids and step.tokens)
                if not wanted:
                    continue
                out = _chunk_choice(choice.index, text) | {"finish_reason": step.finish_reason}
                if body.logprobs is not None and step.scored:
                    offset = self._said.get(choice.index, 0)
                    out["logprobs"] = logprobs = completion_logprobs(_rows(step.scored), self._service.texts, offset)
                    self._said[choice.index] = offset + sum(map(len, logprobs["tokens"]))
                if body.return_pieces:
                    out["pieces"] = step.origins
                if body.return_token_ids:
                    out["token_ids"] = [event.token_id for event in step.tokens]
                chunk = head | {"choices": [out]}
                if options.continuous_usage_stats:
                    chunk["usage"] = self._request.usage()
                if body.timings_per_token and choice.job is not None:
                    chunk["timings"] = self._service.timings(choice.job)
                yield event_bytes(chunk)
        finally:
            await steps.aclose()
        figures: dict[str, Any] = {"usage": self._request.usage()} if options.include_usage else {}
        if body.return_metrics:
            figures["metrics"] = self._service.speculation(self._request.jobs[0])
        if body.timings_per_token:
            figures["timings"] = self._service.timings(self._request.jobs[0])
        if figures:
            yield event_bytes(head | {"choices": []} | figures)
        yield DONE


def _chunk_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _rows(events: Sequence[Any]) -> list[Any]:
    return [(event.token_id, event.logprob, event.top_logprobs or []) for event in events]
