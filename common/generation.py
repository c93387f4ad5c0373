"""The loop: draft, verify, commit, stream, stop, count."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quasar.drafting import DraftTarget, check_draft, new_drafter
from quasar.drafting.cascade import CascadeDrafter
from quasar.drafting.costs import pass_costs
from quasar.errors import QuasarError
from quasar.memory import out_of_memory_in_one_line
from quasar.models.decoder import Decoder
from quasar.models.model import Model
from quasar.speculation.acceptance import GreedyAcceptance, SamplingAcceptance
from quasar.speculation.draft import Drafter
from quasar.speculation.sampling import Sampling
from quasar.speculation.speculator import Speculator
from quasar.speculation.verifier import Verifier
from quasar.speculation.window import AdaptiveWindow, FixedWindow, Window
from quasar.text import TextStream

MAX_FIXED_GAMMA = 32
LEAST_BLOCK = 7  # tokens: a pass in full precision for fewer would cost more than it confirms


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate and how. Speculation changes the speed, never the output."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    draft: str = "ngram"  # one of quasar.drafting.DRAFTS
    gamma: int | None = None  # tokens drafted per pass; None adapts to the measured acceptance and cost
    lossless: bool = False  # confirm what a quantised model says in full precision, block by block
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QuasarError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.gamma is not None and not 1 <= self.gamma <= MAX_FIXED_GAMMA:
            raise QuasarError(f"gamma is {self.gamma}; it must lie between 1 and {MAX_FIXED_GAMMA}")
        check_draft(self.draft)
        self.sampling()

    def sampling(self) -> Sampling | None:
        """The distribution to sample from, None for greedy; QuasarError if it makes none."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed) if self.temperature else None


@dataclass
class GenerationStats:
    """Counts and seconds of one generation."""

    passes: int = 0  # verification passes, the prompt's not among them
    tokens: int = 0  # of output; the first comes from the prompt's pass
    drafted: int = 0
    accepted: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    seconds_draft: float = 0.0  # of seconds_decode
    weight_bytes_per_pass: int = 0
    draft_passes: int = 0  # of the decoders that draft; with lossless, the quantised model's passes are among them
    draft_weight_bytes: int = 0  # read by them

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per verification pass; 1.0 without speculation."""
        return (self.tokens - 1) / self.passes if self.passes else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding."""
        return (self.tokens - 1) / self.seconds_decode if self.seconds_decode else 0.0

    @property
    def weight_bytes_per_token(self) -> float:
        """Read for one token of output, by verification and drafting together."""
        drafting = self.draft_weight_bytes / (self.tokens - 1) if self.tokens > 1 else 0.0
        return self.weight_bytes_per_pass / self.acceptance_length + drafting

    def as_dict(self) -> dict[str, float]:
        derived = ("acceptance_length", "tokens_per_second", "weight_bytes_per_token")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass
class Result:
    """A finished generation. `finish_reason` is "stop" (end token or stop string) or "length"."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    finish_reason: str = "length"
    accept_lengths: list[int] = field(default_factory=list)  # tokens committed by each verification pass
    stats: GenerationStats = field(default_factory=GenerationStats)


class Generation:
    """Text that is being generated: iterate for pieces as they become certain; `result()` runs to the end."""

    def __init__(self, model: Model, prompt_ids: Sequence[int], settings: GenerationSettings) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self._result = Result(prompt_tokens=len(self.prompt_ids))
        self._model = model
        _check_prompt(model, self.prompt_ids)
        target_decoder(model, settings)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def result(self) -> Result:
        """Ids, text and statistics of the whole."""
        for _ in self._pieces:
            pass
        return self._result

    def _run(self) -> Iterator[str]:
        with out_of_memory_in_one_line():
            yield from self._text()

    def _text(self) -> Iterator[str]:
        model, settings, result = self._model, self.settings, self._result
        stops = frozenset() if settings.ignore_eos else model.stop_ids
        stream = TextStream(model.decode, settings.stop)
        for tokens in self._committed():
            for token in tokens:
                result.token_ids.append(token)
                result.stats.tokens += 1
                piece = stream.push(token)
                result.text = stream.text
                if piece:
                    yield piece
                if token in stops or stream.stopped:
                    result.finish_reason = "stop"
                    break
            if result.finish_reason == "stop":
                break
        rest = stream.finish()
        result.text = stream.text
        if rest:
            yield rest

    def _committed(self) -> Iterator[list[int]]:
        """Committed tokens, window by window, up to the token or context limit; they may run past a stop."""
        model, settings, stats = self._model, self.settings, self._result.stats
        decoder = target_decoder(model, settings)
        stats.weight_bytes_per_pass = decoder.weight_bytes_per_pass
        limit = min(settings.max_new_tokens, decoder.config.max_position_embeddings - len(self.prompt_ids))
        sampling = settings.sampling()
        acceptance = GreedyAcceptance(decoder.backend.argmax) if sampling is None else SamplingAcceptance(sampling)
        cache = decoder.new_cache(len(self.prompt_ids) + limit)
        verifier = Verifier(decoder, cache, acceptance)
        if settings.lossless:
            drafter: Drafter | None = cascade(model, settings, cache.capacity)
            window: Window = adaptive_window(decoder, drafter, acceptance=0.9, least=LEAST_BLOCK)
        else:
            drafter = new_drafter(settings.draft, DraftTarget(model, cache, sampling))
            window = new_window(settings, decoder, drafter)
        speculator = Speculator(verifier, drafter, window)

        clock = time.perf_counter()
        last = verifier.start(self.prompt_ids)
        if drafter is not None:
            drafter.extend([*self.prompt_ids, last])
        stats.seconds_prefill = time.perf_counter() - clock
        before = (drafter.passes, drafter.weight_bytes) if drafter is not None else (0, 0)
        yield [last]
        done = 1
        try:
            while done < limit:
                clock = time.perf_counter()
                tokens = speculator.step([last], done, limit - done)
                if drafter is not None:
                    drafter.extend(tokens)
                    stats.draft_passes = drafter.passes - before[0]
                    stats.draft_weight_bytes = drafter.weight_bytes - before[1]
                last = tokens[-1]
                done += len(tokens)
                self._result.accept_lengths.append(len(tokens))
                stats.passes, stats.drafted, stats.accepted = verifier.passes, speculator.drafted, speculator.accepted
                stats.seconds_draft = speculator.seconds_draft
                stats.seconds_decode += time.perf_counter() - clock
                yield tokens
        finally:
            if drafter is not None:
                drafter.finish()


def target_decoder(model: Model, settings: GenerationSettings) -> Decoder:
    """The decoder whose output it is: the model's, or with lossless the full-precision one behind it."""
    if not settings.lossless:
        return model.decoder
    if model.precision == "full":
        raise QuasarError("--lossless confirms what a quantised model says; --precision full already is lossless")
    if model.full is None:
        raise QuasarError("--lossless needs the full-precision weights too; load with lossless=True")
    return model.full


def cascade(model: Model, settings: GenerationSettings, capacity: int) -> CascadeDrafter:
    """The quantised model, with the drafter and window of the settings, as drafter of the full-precision one."""
    sampling = settings.sampling()
    cache = model.decoder.new_cache(capacity)
    drafter = new_drafter(settings.draft, DraftTarget(model, cache, sampling))
    return CascadeDrafter(model.decoder, cache, drafter, new_window(settings, model.decoder, drafter), sampling)


def new_window(settings: GenerationSettings, decoder: Decoder, drafter: Drafter | None) -> Window:
    """Of the settings' gamma; None adapts."""
    if drafter is None or settings.gamma is not None:
        return FixedWindow(settings.gamma or 0)
    return adaptive_window(decoder, drafter)


def adaptive_window(decoder: Decoder, drafter: Drafter, **options: Any) -> AdaptiveWindow:
    """With the costs of both on this device; options as AdaptiveWindow takes them."""
    seconds = drafter.seconds_per_token()
    return AdaptiveWindow(
        pass_costs(decoder), drafts_are_free=not drafter.takes_passes, draft_seconds=seconds, **options
    )


def generate(
    model: Model,
    prompt: str | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    chat: bool = False,
    **overrides: Any,
) -> Generation:
    """Starts generating from text or token ids.

    `for piece in generate(model, prompt): ...` streams; `generate(model, prompt).result()` waits. Settings are given
    whole or by name: `generate(model, prompt, max_new_tokens=64, temperature=0.7)`.
    """
    if settings is not None and overrides:
        raise TypeError("give settings or single settings by name, not both")
    ids = model.encode(prompt, chat) if isinstance(prompt, str) else list(prompt)
    return Generation(model, ids, settings or GenerationSettings(**overrides))


def _check_prompt(model: Model, ids: Sequence[int]) -> None:
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
