"""The choices of one request: their sequences followed together, step by step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quasar.engine.settings import GenerationSettings, TokenEvent
from quasar.server.answers import Answer, AnswerParser, Pieces
from quasar.server.jobs import Job
from quasar.server.service import Service
from quasar.server.tokens import LogprobHold


@dataclass
class Step:
    """What one or more passes brought to one choice."""

    choice: Choice
    pieces: Pieces = field(default_factory=Pieces)
    tokens: list[TokenEvent] = field(default_factory=list)
    scored: list[TokenEvent] = field(default_factory=list)  # tokens whose log-probabilities are due
    origins: list[dict[str, Any]] = field(default_factory=list)  # text by how it came
    finish_reason: str | None = None  # on the last step


class Choice:
    """One sequence and the reading of its answer."""

    def __init__(self, service: Service, index: int, prompt: Sequence[int], settings: GenerationSettings) -> None:
        self.index = index
        self.prompt = prompt
        self.settings = settings
        self.parser: AnswerParser | None = None  # None: text as it is
        self.answer = Answer()
        self.scored: list[TokenEvent] = []
        self.origins: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.hold: LogprobHold | None = None
        if settings.logprobs is not None:
            ends = service.model.stop_ids | frozenset(settings.stop_token_ids)
            self.hold = LogprobHold(service.texts, ends)
        self.job: Job | None = None

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self.parser is None else self.parser.reasoning_tokens

    async def steps(self) -> AsyncIterator[Step]:
        """Until the end; the last step has a finish reason."""
        assert self.job is not None
        async for batch in self.job.batches():
            step = Step(self, tokens=[event for event in batch if event.token_id is not None])
            for event in batch:
                self._read(event, step)
            if self.hold is not None:
                step.scored = self.hold.push(batch)
            self._keep(step)
            yield step
        result = self.job.result
        assert result is not None
        last = Step(self)
        if self.parser is not None:
            last.pieces = self.parser.finish()
            last.origins = [
                {"kind": k, "text": t, "drafted": False} for k, t in last.pieces.parts if isinstance(t, str)
            ]
        if self.hold is not None:
            last.scored = self.hold.finish(isinstance(result.stop_reason, str))
        called = self.parser is not None and self.parser.called and result.finish_reason == "stop"
        self.finish_reason = last.finish_reason = "tool_calls" if called else result.finish_reason
        self._keep(last)
        yield last

    def _read(self, event: TokenEvent, step: Step) -> None:
        if not event.text:
            return
        pieces = self.parser.push(event.text) if self.parser else Pieces([("content", event.text)])
        for kind, text in pieces.parts:
            if isinstance(text, str):
                step.origins.append({"kind": kind, "text": text, "drafted": event.drafted})
        step.pieces.extend(pieces)

    def _keep(self, step: Step) -> None:
        self.answer.take(step.pieces)
        self.scored += step.scored
        self.origins += step.origins
        self.token_ids += [event.token_id for event in step.tokens if event.token_id is not None]


class Request:
    """All choices of a request. Use it as a context: leaving it early cancels what still runs."""

    def __init__(self, service: Service, choices: Sequence[Choice]) -> None:
        self.service = service
        self.choices = list(choices)

    @property
    def jobs(self) -> list[Job]:
        return [choice.job for choice in self.choices if choice.job is not None]

    def start(self) -> Request:
        """Submits the choices. Raises ApiError, and then none of them runs."""
        self.service.jobs.check_room(len(self.choices))  # others came while this one was prepared
        try:
            for choice in self.choices:
                choice.job = self.service.jobs.submit(choice.prompt, choice.settings)
        except BaseException:
            self.cancel()
            raise
        return self

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    async def steps(self) -> AsyncIterator[Step]:
        """Of all choices, as they come."""
        try:
            if len(self.choices) == 1:
                async for step in self.choices[0].steps():
                    yield step
                return
            async for step in self._merged():
                yield step
        finally:
            self.cancel()

    async def _merged(self) -> AsyncIterator[Step]:
        news: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()

        async def follow(choice: Choice) -> None:
            try:
                async for step in choice.steps():
                    news.put_nowait(step)
                news.put_nowait(None)
            except BaseException as error:
                news.put_nowait(error)
                raise

        tasks = [asyncio.ensure_future(follow(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                step = await news.get()
                if isinstance(step, BaseException):
                    raise step
                if step is None:
                    left -= 1
                else:
                    yield step
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(BaseException):
                    await task

    async def finish(self) -> None:
        """Waits for all."""
        async for _ in self.steps():
            pass

    def usage(self) -> dict[str, Any]:
        prompts = {id(choice.prompt): choice.prompt for choice in self.choices}
        reasoning = sum(choice.reasoning_tokens for choice in self.choices)
        return self.service.usage(self.jobs, list(prompts.values()), reasoning)
