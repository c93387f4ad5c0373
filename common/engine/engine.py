"""Many sequences at once: admit, draft, choose rows, run one pass, hand tokens out, retire."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from quasar.drafting import DraftTarget, new_drafter
from quasar.drafting.corpus import Corpus
from quasar.drafting.memory import DraftMemory
from quasar.engine.sequence import Handle, Listener, Request
from quasar.engine.settings import GenerationSettings, Result
from quasar.engine.slots import Held, SlotPool
from quasar.engine.worth import Worth
from quasar.errors import QuasarError
from quasar.memory import gigabytes, host_memory
from quasar.models.model import Model
from quasar.models.runtime import PROMPT_ROWS, Runtime
from quasar.speculation.draft import Draft
from quasar.speculation.rows import MOST_ROWS, RowRule
from quasar.speculation.verifier import Verdict, Verifier, Window

PROMPT_SECONDS = 0.1  # for so long a prompt's rows may hold decoding sequences up, in each pass
_LEAST_PROMPT_ROWS = 16
_LONGEST_DRAFT = 15  # candidates of one sequence, where the settings set no cap
_SHORT_DRAFT, _SHORT_DRAFTS = 7, 8  # so few candidates are asked for so many times where no more were verified
_LONGEST_BLOCK = 31  # tokens that a cascade confirms at once
_HOST_SHARE = 0.4  # of free host memory that keys and values may take where nothing else is said


@dataclass
class EngineStats:
    """What the engine holds and has done."""

    running: int = 0
    waiting: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    kv_bytes: int = 0  # of running and idle slots
    kv_bytes_limit: int = 0
    prefix_queried_tokens: int = 0
    prefix_cached_tokens: int = 0


class Engine:
    """Decodes up to `max_sequences` sequences of one model together; more wait their turn.

    A sequence's text does not depend on the others. `submit` may be called from any thread; the passes run in a
    thread of the engine's own, which starts with the first submission and ends with `shutdown`.
    """

    def __init__(
        self,
        model: Model,
        max_sequences: int = 16,
        *,
        kv_bytes: int | None = None,
        lossless: bool = False,
        own_thread: bool = True,
        row_rule: RowRule | None = None,
        draft_memory: DraftMemory | None = None,
    ) -> None:
        """kv_bytes bounds the keys and values of all sequences, also of ended ones that are kept for their prefix
        (None: two fifths of the host's free memory). own_thread=False: passes run in `step`, which the caller calls
        until it returns False. draft_memory: what drafters learn from the requests, this engine's alone (None: from
        now on, in memory).
        Raises QuasarError where lossless is asked of a model without full-precision weights.
        """
        if max_sequences < 1:
            raise QuasarError(f"max_sequences is {max_sequences}; it must be 1 or more")
        self.model = model
        self.max_sequences = max_sequences
        self.lossless = lossless
        self.runtime: Runtime = model.target_runtime(lossless)
        self._slots = SlotPool(
            self.runtime, max_sequences, kv_bytes if kv_bytes is not None else int(_HOST_SHARE * host_memory())
        )
        self.draft_memory = DraftMemory(Corpus()) if draft_memory is None else draft_memory
        self._verifier = Verifier(self.runtime)
        self._rule = row_rule or RowRule(self.runtime.backend.captures_rows)
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._own_thread = own_thread
        self._process = os.getpid()
        self._closing = self._closed = False
        self._around: deque[float] = deque([0.0], maxlen=9)  # seconds of the latest steps beyond their passes
        self._usually_around = 0.0  # their median
        self._prompt_row_seconds = 0.0
        self._worth = Worth()
        self._stats = EngineStats(kv_bytes_limit=self._slots.bytes_limit)

    # From any thread.

    def submit(
        self,
        prompt: str | Sequence[int],
        settings: GenerationSettings | None = None,
        *,
        chat: bool = False,
        on_events: Listener | None = None,
        **overrides: Any,
    ) -> Handle:
        """Queues a prompt, text or token ids. Settings are given whole or by name.

        on_events, called in the engine's thread, takes the events of each pass and None at the end; without it the
        handle keeps them. Raises QuasarError for prompts and settings that cannot be.
        """
        if settings is not None and overrides:
            raise TypeError("give settings or single settings by name, not both")
        settings = settings or GenerationSettings(**({"lossless": self.lossless} | overrides))
        if settings.lossless != self.lossless:
            raise QuasarError(f"lossless={settings.lossless}: the engine was made with lossless={self.lossless}")
        ids = self.model.encode(prompt, chat) if isinstance(prompt, str) else list(prompt)
        request = Request(self.model, ids, settings)
        needed = self._slots.bytes_for(request.capacity)
        if needed > self._slots.bytes_limit:
            raise QuasarError(
                f"{request.capacity} tokens of context need {gigabytes(needed)} of keys and values; the engine has "
                f"{gigabytes(self._slots.bytes_limit)}; ask for fewer new tokens, or give it more memory"
            )
        handle = Handle(request, self._wake, on_events)
        if self._own_thread and self._process != os.getpid():
            raise QuasarError("this process was forked off the one whose thread runs this engine; make an engine here")
        with self._changed:
            if self._closing:
                raise QuasarError("the engine is shutting down")
            self._waiting.append(request)
            if self._own_thread and self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="quasar-engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return handle

    def generate(
        self, prompts: Sequence[str | Sequence[int]], settings: GenerationSettings | None = None, **overrides: Any
    ) -> list[Result]:
        """Generates for all prompts together; results in their order. Settings as in `submit`."""
        handles = [self.submit(prompt, settings, **overrides) for prompt in prompts]
        if not self._own_thread:
            while self.step():
                pass
        return [handle.result() for handle in handles]

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        with self._changed:
            s = self._stats
            s.running, s.waiting = len(self._running), len(self._waiting)
            s.prefix_queried_tokens, s.prefix_cached_tokens = self._slots.queried_tokens, self._slots.found_tokens
            s.kv_bytes = self._slots.nbytes + sum(r.slot.nbytes for r in self._running if r.slot is not None)
            return EngineStats(**vars(s))

    def shutdown(self, wait_seconds: float = 0.0) -> None:
        """Takes no more prompts, lets those that run end for so long, and cancels the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(wait_seconds)
        with self._changed:
            for request in (*self._running, *self._waiting):
                request.cancelled = True
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        while not self._own_thread and self.step():
            pass

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # In the engine's thread.

    def _serve(self) -> None:
        while True:
            while self.step():
                pass
            with self._changed:
                if self._closing and not self._running and not self._waiting:
                    return
                if not self._waiting:
                    self._changed.wait()

    def step(self) -> bool:
        """One pass over what runs; returns whether there is more to do."""
        clock = time.perf_counter()
        self._admit()
        admitted = len(self._running)
        requests = self._take_turns()
        if not requests:
            return admitted > 0  # all of them were cancelled: there is room for those that wait
        costs_known = self.runtime.costs_known  # or this step measures them
        drafted_before = _draft_seconds(requests)
        asks = self._worth.asks(len(requests))
        try:
            rows = self._prompt_rows(requests)
            least = self._least(requests, rows)
            drafts = [self._draft(request, asks, least) for request in requests]
            windows = self._windows(requests, drafts, rows)
            begin = time.perf_counter()
            with self.runtime.lock:
                verdicts = self._verifier.step(windows)
            pass_seconds = time.perf_counter() - begin
        except Exception as error:  # nothing was committed; whoever waits is told, the engine goes on
            for request in requests:
                self._retire(request, error)
            return True
        for request, draft, window, verdict in zip(requests, drafts, windows, verdicts, strict=True):
            self._hand_out(request, draft, window, verdict)
        seconds = time.perf_counter() - clock
        usual = self._measure(windows, seconds, pass_seconds)
        if asks and usual and costs_known:
            drafting = _draft_seconds(requests) - drafted_before + self._row_seconds(windows)
            accepted = sum(len(verdict.accepted) for verdict in verdicts)
            plain = max(seconds - drafting, pass_seconds / 2)  # what rows cost is an estimate
            self._worth.learn(len(requests), accepted, drafting, plain)
        return True

    def _admit(self) -> None:
        """Gives waiting requests slots, in their order, as long as there is room."""
        with self._changed:
            for request in [r for r in self._waiting if r.cancelled]:
                self._waiting.remove(request)
                request.finish()
        while True:
            with self._changed:
                if not self._waiting or len(self._running) >= self.max_sequences:
                    return
                request = self._waiting[0]
            try:
                held = [Held(r.slot, r.tokens, r.prefilling) for r in self._running if r.slot is not None]
                request.slot = self._slots.take(request.tokens, request.capacity, held)
                if request.slot is None:
                    return
                self._start(request)
            except Exception as error:
                request.finish(error)
                if request.slot is not None:
                    request.slot.rewind(0)
                    self._slots.put(request.slot, [])
            with self._changed:
                self._waiting.popleft()
                if not request.done:
                    self._running.append(request)

    def _start(self, request: Request) -> None:
        assert request.slot is not None
        request.admitted = time.perf_counter()
        request.result.stats.cached_tokens = request.slot.length
        request.result.stats.weight_bytes_per_pass = self.runtime.decoder.weight_bytes_per_pass
        target = DraftTarget(
            self.model,
            request.slot,
            request.chooser.sampling,
            request.settings.gamma,
            self.lossless,
            self.draft_memory,
        )
        request.drafter = new_drafter(request.settings.draft, target)
        if request.drafter is not None:
            request.drafter.extend(request.tokens)

    def _take_turns(self) -> list[Request]:
        """The requests of the next pass: all that decode, and prompts first come, first served."""
        for request in [r for r in self._running if r.cancelled]:
            self._retire(request)
        return list(self._running)

    def _may_rest(self, request: Request) -> bool:
        """Whether a sequence's drafter may be left out of a step. Who fixes gamma or has a decoder draft wants it in
        each."""
        drafter = request.drafter
        return drafter is not None and not (request.settings.gamma or drafter.takes_passes or self.lossless)

    def _least(self, requests: Sequence[Request], prompt_rows: dict[Request, int]) -> float:
        """Survival below which no candidate of this step pays."""
        decoding = sum(not r.prefilling for r in requests)
        if not self.runtime.costs_known or not decoding:
            return 0.0
        return self._rule.least(decoding, decoding + sum(prompt_rows.values()), self._seconds)

    def _draft(self, request: Request, asks: bool, least: float) -> Draft:
        """Candidates of one sequence, most probable first; none for prompts.

        asks: whether drafters that may rest are asked in this step; least: survival below which none pays.
        """
        drafter, settings = request.drafter, request.settings
        request.asked = False
        if drafter is None or request.prefilling or request.room < 1:
            return Draft()
        if not asks and self._may_rest(request):
            return Draft()
        request.asked = True
        most = min(_longest(settings), request.room)
        if settings.gamma is not None:  # so many are verified, whatever they cost
            least = 0.0
        if request.short_drafts and settings.gamma is None and not drafter.takes_passes:
            request.short_drafts -= 1
            most = min(most, _SHORT_DRAFT)
        clock = time.perf_counter()
        if settings.grammar is not None:
            forced = settings.grammar.forced()[:most]
            if forced:  # they must come: candidates that cost a row and no risk
                return Draft.chain(forced, [1.0] * len(forced), [("grammar", 0, 0)] * len(forced))
        draft = Draft()
        if drafter.takes_passes and (settings.gamma is None or self.lossless):
            others, expected = len(self._running) - 1, drafter.expected_survival(most)
            draft = drafter.propose_free(min(most, settings.gamma or _LONGEST_DRAFT), least)
            most = self._rule.chain(expected, self._seconds, drafter.seconds_per_token(), others, draft)
        if most:
            draft = drafter.propose(most, (), least)
        if settings.grammar is not None:
            draft = _valid(draft, settings.grammar)
        request.result.stats.seconds_draft += time.perf_counter() - clock
        return draft

    def _seconds(self, rows: int) -> float:
        """Of a step whose pass has so many rows."""
        return self.runtime.costs(rows) + self._usually_around

    def _prompt_rows(self, requests: Sequence[Request]) -> dict[Request, int]:
        """Rows of each prompt in this pass; where others decode, they are held up for a bounded time."""
        left = PROMPT_ROWS
        if any(not request.prefilling for request in requests) and self._prompt_row_seconds:
            left = max(_LEAST_PROMPT_ROWS, min(left, int(PROMPT_SECONDS / self._prompt_row_seconds)))
        rows = {}
        for request in requests:
            if request.prefilling:
                rows[request] = min(left, request.uncached_tokens)
                left -= rows[request]
        return rows

    def _windows(self, requests: list[Request], drafts: list[Draft], prompt_rows: dict[Request, int]) -> list[Window]:
        """The pass: every sequence's next token, prompts' rows, and the candidates that pay."""
        decoding = [(r, d) for r, d in zip(requests, drafts, strict=True) if not r.prefilling]
        base = sum(prompt_rows.values()) + len(decoding)
        proposed = [d for _, d in decoding]
        if not any(d.tokens for d in proposed):
            chosen = [0] * len(decoding)
        elif not self.lossless and all(r.settings.gamma is not None for r, _ in decoding):  # their users' choice
            chosen = [len(d.tokens) for d in proposed]
        else:
            chosen = self._rule.candidates(proposed, base, self._seconds, max(MOST_ROWS, base))
        count = dict(zip((r for r, _ in decoding), chosen, strict=True))
        for request, draft in decoding:
            if count[request] <= _SHORT_DRAFT < len(draft):
                request.short_drafts = _SHORT_DRAFTS
        windows = []
        for request, draft in zip(list(requests), list(drafts), strict=True):  # both get shorter on the way
            assert request.slot is not None
            held, drafter = request.slot.length, request.drafter
            if request.prefilling:
                rows = prompt_rows[request]
                if not rows:  # its turn comes when the prompts before it are read
                    drafts.pop(requests.index(request))
                    requests.remove(request)
                    continue
                chunk = request.tokens[held : held + rows]
                chooser = request.chooser if rows == request.uncached_tokens else None
                windows.append(Window(request.slot, chunk, chooser, logprobs=request.settings.logprobs))
            else:
                windows.append(
                    Window(
                        request.slot,
                        request.tokens[held:],
                        request.chooser,
                        draft.first(count[request]),
                        drafter.top_k if drafter is not None and request.asked else 0,
                        request.settings.logprobs,
                    )
                )
        return windows

    def _hand_out(self, request: Request, draft: Draft, window: Window, verdict: Verdict) -> None:
        self._stats.passes += 1
        if window.chooser is None:
            return
        drafter = request.drafter
        known = len(request.tokens)
        over = request.take(window.draft, verdict)
        stats = request.result.stats
        if drafter is not None:
            stats.draft_passes, stats.draft_weight_bytes = drafter.passes, drafter.weight_bytes
            clock = time.perf_counter()
            if request.asked:
                drafter.observe(draft, len(window.draft), verdict.own, verdict.top)
            drafter.extend(request.tokens[known:])
            stats.seconds_draft += time.perf_counter() - clock
        self._stats.tokens += len(verdict.tokens)
        self._stats.drafted += len(window.draft)
        self._stats.accepted += len(verdict.accepted)
        if over:
            self._retire(request)

    def _measure(self, windows: Sequence[Window], seconds: float, pass_seconds: float) -> bool:
        """Learns what a step took; returns whether it was one as most are: no prompt, nothing for the first time."""
        rows = sum(len(window.uncached_tokens) + len(window.draft) for window in windows)
        read = sum(len(window.uncached_tokens) for window in windows) - len(windows)  # beside everybody's last token
        usual = not read and all(window.chooser is not None for window in windows) and self.runtime.settled
        if read >= _LEAST_PROMPT_ROWS - 1:  # each time, so that one slow pass does not cut all prompts small
            self._prompt_row_seconds = pass_seconds / rows
        elif self.runtime.costs_known and rows <= MOST_ROWS:
            self._around.append(seconds - pass_seconds)
            self._usually_around = max(median(self._around), 0.0)
            if usual:
                self.runtime.costs.learn(rows, pass_seconds)
        return usual

    def _row_seconds(self, windows: Sequence[Window]) -> float:
        """What the rows of candidates add to a pass."""
        drafted = sum(len(window.draft) for window in windows)
        rows = drafted + sum(len(window.uncached_tokens) for window in windows)
        return self.runtime.costs(rows) - self.runtime.costs(rows - drafted) if drafted else 0.0

    def _retire(self, request: Request, error: BaseException | None = None) -> None:
        """Ends a request; its slot stays for the prompts that begin as it did."""
        if request in self._running:
            with self._changed:
                self._running.remove(request)
        if request.slot is not None:
            if error is not None:
                request.slot.rewind(0)  # what a failed pass left there is unknown
            self._slots.put(request.slot, request.tokens)
            request.slot = None
        request.finish(error)


def _draft_seconds(requests: Sequence[Request]) -> float:
    return sum(request.result.stats.seconds_draft for request in requests)


def _longest(settings: GenerationSettings) -> int:
    if settings.lossless:  # gamma is the quantised model's
        return _LONGEST_BLOCK
    return settings.gamma or _LONGEST_DRAFT


def _valid(draft: Draft, grammar: Any) -> Draft:
    """The draft without candidates that the grammar forbids."""
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(draft.parents):
        children.setdefault(parent, []).append(row)
    kept: set[int] = set()

    def walk(row: int, text: list[int]) -> None:
        for child in children.get(row, ()):
            path = [*text, draft.tokens[child]]
            if grammar.valid_prefix(path) == len(path):
                kept.add(child)
                walk(child, path)

    walk(-1, [])
    order = sorted(kept)
    place = {-1: -1} | {row: i for i, row in enumerate(order)}
    return Draft(
        [draft.tokens[row] for row in order],
        [place[draft.parents[row]] for row in order],
        [draft.survival[row] for row in order],
        [draft.keys[row] for row in order],
    )
