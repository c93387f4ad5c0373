"""The loop: draft, verify, commit, stream, stop, count."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.drafting import new_drafter
from common.drafting.base import Draft
from common.drafting.window import AdaptiveWindow, FixedWindow
from common.errors import QuasarError
from common.models.model import Model
from common.text import TextStream
from common.verification.acceptance import GreedyAcceptance, Sampling, SamplingAcceptance
from common.verification.verifier import Verifier

MAX_FIXED_GAMMA = 32


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate and how. Speculation changes the speed, never the output."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    draft: str = "ngram"
    gamma: int | None = None  # tokens drafted per pass; None adapts to the measured acceptance
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QuasarError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.gamma is not None and not 1 <= self.gamma <= MAX_FIXED_GAMMA:
            raise QuasarError(f"gamma is {self.gamma}; it must lie between 1 and {MAX_FIXED_GAMMA}")
        if self.temperature != 0:
            self.sampling()

    def sampling(self) -> Sampling:
        """The distribution to sample from; QuasarError if it makes none."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@dataclass
class GenerationStats:
    """Counts and seconds of one generation."""

    passes: int = 0  # verification passes, the prompt's not among them
    tokens: int = 0  # of output; the first comes from the prompt's pass
    drafted: int = 0
    accepted: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    weight_bytes_per_pass: int = 0

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
        return self.weight_bytes_per_pass / self.acceptance_length

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"acceptance_length": self.acceptance_length, "tokens_per_second": self.tokens_per_second}


@dataclass
class Result:
    """A finished generation. `finish_reason` is "stop" (end token or stop string) or "length"."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    finish_reason: str = "length"
    stats: GenerationStats = field(default_factory=GenerationStats)


class Generation:
    """Text that is being generated: iterate for pieces as they become certain; `result()` runs to the end."""

    def __init__(self, model: Model, prompt_ids: Sequence[int], settings: GenerationSettings) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self._result = Result(prompt_tokens=len(self.prompt_ids))
        self._model = model
        _check_prompt(model, self.prompt_ids)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def result(self) -> Result:
        """Ids, text and statistics of the whole."""
        for _ in self._pieces:
            pass
        return self._result

    def _run(self) -> Iterator[str]:
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
        decoder = model.decoder
        decoder.pack()
        stats.weight_bytes_per_pass = decoder.weight_bytes_per_pass
        limit = min(settings.max_new_tokens, decoder.config.max_position_embeddings - len(self.prompt_ids))
        acceptance = SamplingAcceptance(settings.sampling()) if settings.temperature else GreedyAcceptance()
        verifier = Verifier(decoder, decoder.new_cache(len(self.prompt_ids) + limit), acceptance)
        drafter = new_drafter(settings.draft)
        window = AdaptiveWindow() if settings.gamma is None else FixedWindow(settings.gamma)

        clock = time.perf_counter()
        last = verifier.start(self.prompt_ids)
        stats.seconds_prefill = time.perf_counter() - clock
        if drafter is not None:
            drafter.extend([*self.prompt_ids, last])
        yield [last]
        done = 1
        while done < limit:
            clock = time.perf_counter()
            # A pass commits one token more than it drafts: never draft what could not be kept.
            gamma = min(window.gamma(), limit - done - 1) if drafter is not None else 0
            # A plain step still drafts one token, which costs no pass: whether it was right says when to resume.
            proposal = drafter.propose(max(gamma, 1)) if drafter is not None else Draft()
            draft = proposal if gamma else Draft()
            tokens = verifier.step(last, draft, done)
            accepted = len(tokens) - 1
            if drafter is not None:
                drafter.extend(tokens)
                hits = accepted if gamma else int(proposal.tokens[:1] == tokens[:1])
                window.observe(len(proposal.tokens), hits)
            last = tokens[-1]
            done += len(tokens)
            stats.passes, stats.drafted, stats.accepted = (
                verifier.passes,
                stats.drafted + len(draft.tokens),
                stats.accepted + accepted,
            )
            stats.seconds_decode += time.perf_counter() - clock
            yield tokens


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
