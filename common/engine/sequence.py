"""One sequence of the engine: what it was asked, where it stands, and who listens."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from quasar.backends.base import Slot
from quasar.engine.settings import GenerationSettings, Result, TokenEvent
from quasar.errors import QuasarError
from quasar.models.model import Model
from quasar.speculation.choice import TokenChooser
from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.verifier import Verdict
from quasar.text import TextStream

Listener = Callable[[list[TokenEvent] | None], None]


class Request:
    """The engine's side. `tokens` is the whole text: the prompt and what was committed behind it."""

    def __init__(self, model: Model, prompt: Sequence[int], settings: GenerationSettings) -> None:
        """Raises QuasarError for a prompt that the model cannot take."""
        check_prompt(model, prompt)
        positions = model.config.max_position_embeddings
        self.settings = settings
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.limit = min(settings.max_new_tokens, positions - len(prompt))  # of output
        self.ends = (frozenset() if settings.ignore_eos else model.stop_ids) | frozenset(settings.stop_token_ids)
        self.chooser = TokenChooser(settings.sampling(), settings.rules(self.ends), settings.grammar, prompt)
        self.slot: Slot | None = None  # from admission to retirement
        self.drafter: Drafter | None = None
        self.asked = False  # whether the drafter was, in this step
        self.short_drafts = 0  # drafts that are kept short
        self.result = Result(prompt_tokens=len(prompt))
        if settings.logprobs is not None:
            self.result.logprobs = []
        self.error: BaseException | None = None
        self.cancelled = False
        self.admitted = self.first_token = 0.0  # clocks
        self._stream = TextStream(model.decode, settings.stop)
        self._listener: Listener | None = None

    @property
    def capacity(self) -> int:
        """Positions that it may need."""
        return self.prompt_tokens + self.limit

    @property
    def uncached_tokens(self) -> int:
        """Committed tokens that the slot does not hold: the rest of the prompt, then the last token."""
        assert self.slot is not None
        return len(self.tokens) - self.slot.length

    @property
    def prefilling(self) -> bool:
        return not self.result.token_ids

    @property
    def room(self) -> int:
        """The most candidates that could still be kept: a pass commits one token more than it drafts."""
        return self.limit - len(self.result.token_ids) - 1

    def listen(self, listener: Listener) -> None:
        """listener(events) after each pass, listener(None) once at the end, in the engine's thread."""
        self._listener = listener

    def take(self, draft: Draft, verdict: Verdict) -> bool:
        """Takes what a pass committed, up to a stop; returns whether the sequence is over."""
        now = time.perf_counter()
        result, stats = self.result, self.result.stats
        if self.prefilling:
            self.first_token = now
            stats.seconds_prefill = now - self.admitted
        else:
            stats.passes += 1
            stats.drafted += len(draft.tokens)
            stats.accepted += len(verdict.accepted)
            for row in verdict.accepted:
                source = str(draft.keys[row][0])  # type: ignore[index]
                stats.accepted_by_source[source] = stats.accepted_by_source.get(source, 0) + 1
            result.accept_lengths.append(len(verdict.tokens))
            stats.seconds_decode = now - self.first_token
        events: list[TokenEvent] = []
        over = False
        for i, token in enumerate(verdict.tokens):
            logprob, best = verdict.logprobs[i] if verdict.logprobs else (None, None)
            self.tokens.append(token)
            result.token_ids.append(token)
            stats.tokens += 1
            if result.logprobs is not None and logprob is not None:
                result.logprobs.append(logprob)
            text = self._stream.push(token)
            events.append(TokenEvent(token, text, i < len(verdict.accepted), logprob, best))
            if token in self.ends or self._stream.stopped:
                result.finish_reason = "stop"
                result.stop_reason = self._stream.stop_string if self._stream.stopped else token
                over = True
                break
            if stats.tokens >= self.limit:
                over = True
                break
        result.text = self._stream.text
        self._say(events)
        return over

    def finish(self, error: BaseException | None = None) -> None:
        """Says the rest of the text and that it is over. The second call does nothing."""
        if self.done:
            return
        self.error = error
        if self.cancelled:
            self.result.finish_reason = "cancelled"
        if error is None:
            rest = self._stream.finish()
            self.result.text = self._stream.text
            if rest:
                self._say([TokenEvent(None, rest)])
        if self.drafter is not None:
            self.drafter.finish()
        self.done = True
        self._say(None)

    done = False

    def _say(self, events: list[TokenEvent] | None) -> None:
        if self._listener is not None:
            self._listener(events)


class Handle:
    """A submitted generation: iterate for pieces of text, or wait for `result()`."""

    def __init__(self, sequence: Request, wake: Callable[[], None], listener: Listener | None) -> None:
        """wake: called after a cancellation; listener: takes the events instead of `events()`."""
        self._sequence = sequence
        self._wake = wake
        self._events: queue.SimpleQueue[list[TokenEvent] | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._listener = listener
        sequence.listen(self._take)

    def _take(self, events: list[TokenEvent] | None) -> None:
        if self._listener is None:
            self._events.put(events)
        else:
            self._listener(events)
        if events is None:
            self._over.set()

    def events(self) -> Iterator[list[TokenEvent]]:
        """What each pass brought, as it comes. Raises what ended the sequence early."""
        while (events := self._events.get()) is not None:
            yield events
        self._events.put(None)  # for a second iterator
        self._raise()

    def __iter__(self) -> Iterator[str]:
        for events in self.events():
            for event in events:
                if event.text:
                    yield event.text

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end. Raises TimeoutError after `timeout` seconds, or what ended the sequence early."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"the generation took longer than {timeout} seconds")
        self._raise()
        return self._sequence.result

    def _raise(self) -> None:
        if self._sequence.error is not None:
            raise self._sequence.error

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def cancel(self) -> None:
        """Ends it before the next pass; what came so far stays."""
        self._sequence.cancelled = True
        self._wake()


def check_prompt(model: Model, ids: Sequence[int]) -> None:
    """Raises QuasarError for a prompt that is empty, too long, or holds ids outside the vocabulary."""
    config = model.config
    if not ids:
        raise QuasarError("the prompt is empty; give at least one token")
    if len(ids) >= config.max_position_embeddings:
        raise QuasarError(
            f"the prompt has {len(ids)} tokens; {model.name} has room for "
            f"{config.max_position_embeddings} in all, output included"
        )
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise QuasarError(f"token id {wrong} is outside the vocabulary of {model.name}, 0 to {config.vocab_size - 1}")
