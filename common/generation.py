"""generate(): one sequence, streamed. An engine with one slot, driven by whoever iterates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quasar.drafting.memory import DraftMemory
from quasar.engine.engine import Engine
from quasar.engine.settings import GenerationSettings, GenerationStats, Result, TokenEvent
from quasar.memory import out_of_memory_in_one_line
from quasar.models.model import Model

__all__ = ["Generation", "GenerationSettings", "GenerationStats", "Result", "generate"]


class Generation:
    """Text that is being generated: iterate for pieces as they become certain; `result()` runs to the end."""

    def __init__(
        self, model: Model, prompt_ids: Sequence[int], settings: GenerationSettings, **engine_options: Any
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.settings = settings
        self._engine = Engine(model, max_sequences=1, lossless=settings.lossless, own_thread=False, **engine_options)
        self._events: list[TokenEvent] = []
        self._handle = self._engine.submit(self.prompt_ids, settings, on_events=self._take)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def result(self) -> Result:
        """Ids, text and statistics of the whole."""
        for _ in self._pieces:
            pass
        return self._handle.result()

    def _take(self, events: list[TokenEvent] | None) -> None:
        self._events += events or []

    def _run(self) -> Iterator[str]:
        try:
            with out_of_memory_in_one_line():
                while not self._handle.done:
                    self._engine.step()
                    for event in self._events:
                        if event.text:
                            yield event.text
                    self._events.clear()
                self._handle.result()  # raises what ended it early
        finally:
            if not self._handle.done:  # abandoned half way
                self._handle.cancel()
                self._engine.step()


def generate(
    model: Model,
    prompt: str | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    chat: bool = False,
    draft_memory: DraftMemory | None = None,
    **overrides: Any,
) -> Generation:
    """Starts generating from text or token ids.

    `for piece in generate(model, prompt): ...` streams; `generate(model, prompt).result()` waits. Settings are given
    whole or by name: `generate(model, prompt, max_new_tokens=64, temperature=0.7)`.
    draft_memory: what drafters learnt from earlier calls, one at a time.
    """
    if settings is not None and overrides:
        raise TypeError("give settings or single settings by name, not both")
    ids = model.encode(prompt, chat) if isinstance(prompt, str) else list(prompt)
    return Generation(model, ids, settings or GenerationSettings(**overrides), draft_memory=draft_memory)
