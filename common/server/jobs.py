"""Sequences of the engine, followed from the event loop without a thread for each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from quasar.engine.settings import GenerationSettings, Result, TokenEvent
from quasar.errors import QuasarError
from quasar.server.errors import ApiError
from quasar.server.metrics import Metrics


class EngineLike(Protocol):
    """What the server needs of an engine."""

    max_sequences: int

    def submit(self, prompt: Sequence[int], settings: GenerationSettings, *, on_events: Any) -> Any: ...

    def stats(self) -> Any: ...

    def shutdown(self, wait_seconds: float = 0.0) -> None: ...


class Job:
    """One sequence: iterate for batches of its tokens, then read `result`. Leaving it early cancels it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = list(prompt)
        self.shared_prompt = prompt  # the same object for all choices of a prompt
        self.result: Result | None = None
        self.submitted = time.perf_counter()
        self.first_token = 0.0
        self.done = False
        self.passes = self.tokens = self.accepted = 0  # so far; the prompt's pass is not among them
        self._handle: Any = None
        self._waiting: list[TokenEvent] = []
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """All tokens that came since the last batch, so that a slow reader gets fewer, longer ones."""
        while True:
            await self._news.wait()
            self._news.clear()
            batch, self._waiting = self._waiting, []
            if batch:
                yield batch
            if self.done and not self._waiting:
                break
        try:
            self.result = self._handle.result()
        except QuasarError as error:
            raise ApiError(str(error)) from None
        if self.result.finish_reason == "cancelled":
            raise ApiError("the server is shutting down", status=503, code="shutting_down", retry_after=5)

    def outcome(self) -> Result | None:
        """Of a sequence that is over; None where it failed."""
        with contextlib.suppress(Exception):
            return self._handle.result()
        return None

    def cancel(self) -> None:
        """Frees the sequence's slot before the next pass. Does nothing to one that is over."""
        if self._handle is not None and not self.done:
            self._handle.cancel()

    def heard(self, events: list[TokenEvent] | None) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[TokenEvent] | None) -> None:
        if events is None:
            self.done = True
        else:
            self.first_token = self.first_token or time.perf_counter()
            self.passes += self.tokens > 0 and events[0].token_id is not None
            self.tokens += sum(event.token_id is not None for event in events)
            self.accepted += sum(event.drafted for event in events)
            self._waiting += events
        self._news.set()


class Jobs:
    """Admission: so many sequences run, so many wait, more are turned away."""

    def __init__(self, engine: EngineLike, max_queue: int, metrics: Metrics) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self.metrics = metrics
        self.closing = False
        self._live: set[Job] = set()

    @property
    def live(self) -> int:
        """Sequences that run or wait."""
        return len(self._live)

    @property
    def capacity(self) -> int:
        return self.engine.max_sequences + self.max_queue

    def check_room(self, count: int) -> None:
        """Raises ApiError where `count` more sequences cannot be taken."""
        if self.closing:
            raise ApiError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
        if count > self.capacity:
            raise ApiError(f"{count} sequences in one request; this server takes {self.capacity} at most", param="n")
        if self.live + count > self.capacity:
            self.metrics.refused.inc()
            raise ApiError(
                f"{self.live} requests run or wait; try again later",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_after=1 + self.live // max(1, self.engine.max_sequences),
            )

    def submit(self, prompt: Sequence[int], settings: GenerationSettings) -> Job:
        """Starts a sequence. Raises ApiError for what the engine refuses."""
        job = Job(prompt)
        try:
            job._handle = self.engine.submit(job.prompt, settings, on_events=_Ear(job, self))
        except QuasarError as error:
            raise ApiError(str(error)) from None
        self._live.add(job)
        return job

    def forget(self, job: Job) -> None:
        """The engine is done with it."""
        if job in self._live:
            self._live.discard(job)
            self.metrics.finished(job)

    def cancel_all(self) -> None:
        for job in list(self._live):
            job.cancel()


class _Ear:
    """Hears a sequence in the engine's thread, and tells the loop."""

    def __init__(self, job: Job, jobs: Jobs) -> None:
        self._job = job
        self._jobs = jobs

    def __call__(self, events: list[TokenEvent] | None) -> None:
        self._job.heard(events)
        if events is None:
            with contextlib.suppress(RuntimeError):
                self._job._loop.call_soon_threadsafe(self._jobs.forget, self._job)
