"""What to generate and how, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from quasar.drafting import DEFAULT_DRAFT, DrafterFactory, check_draft
from quasar.errors import QuasarError
from quasar.speculation.choice import Grammar, Rules
from quasar.speculation.sampling import Sampling

MAX_GAMMA = 32


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate and how. Speculation changes the speed, never the output."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    draft: str | DrafterFactory = DEFAULT_DRAFT  # one of quasar.drafting.DRAFTS, or what makes a drafter for a sequence
    gamma: int | None = None  # at most so many candidates a pass; None: as many as pay
    lossless: bool = False  # confirm what a quantised model says in full precision, block by block
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    min_new_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None  # log-probability of each token, and of that many alternatives
    grammar: Grammar | None = None  # of this one sequence

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QuasarError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.gamma is not None and not 1 <= self.gamma <= MAX_GAMMA:
            raise QuasarError(f"gamma is {self.gamma}; it must lie between 1 and {MAX_GAMMA}")
        if "" in self.stop:
            raise QuasarError("a stop string is empty; give at least one character, or leave it out")
        if not self.repetition_penalty > 0:
            raise QuasarError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")
        if isinstance(self.draft, str):
            check_draft(self.draft)
        # Checked at temperature 0 too: a mistake in top_p should not wait for a temperature to show.
        Sampling(self.temperature or 1.0, self.top_k, self.top_p, self.seed, self.min_p)

    def sampling(self) -> Sampling | None:
        """The distribution to sample from, None for greedy."""
        if not self.temperature:
            return None
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed, self.min_p)

    def rules(self, ends: frozenset[int]) -> Rules:
        """What changes logits; ends: the model's end tokens."""
        return Rules(
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
            self.logit_bias,
            self.min_new_tokens,
            ends,
        )


@dataclass
class GenerationStats:
    """Counts and seconds of one generation."""

    passes: int = 0  # verification passes, the prompt's not among them
    tokens: int = 0  # of output; the first comes from the prompt's pass
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0  # of the prompt, found in another sequence's slot
    seconds_prefill: float = 0.0  # from admission to the first token
    seconds_decode: float = 0.0  # from the first token to the last
    seconds_draft: float = 0.0  # of seconds_decode
    weight_bytes_per_pass: int = 0
    draft_passes: int = 0  # of the decoders that draft; with lossless, the quantised model's passes are among them
    draft_weight_bytes: int = 0  # read by them
    accepted_by_source: dict[str, int] = field(default_factory=dict)  # of the draft: ngram, suffix, ...

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
        """Read for one token of output, by verification and drafting together, as if the passes were its own."""
        drafting = self.draft_weight_bytes / (self.tokens - 1) if self.tokens > 1 else 0.0
        return self.weight_bytes_per_pass / self.acceptance_length + drafting

    def as_dict(self) -> dict[str, float]:
        derived = ("acceptance_length", "tokens_per_second", "weight_bytes_per_token")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class TokenEvent:
    """A token of output, or text that was certain only at the end (token_id None)."""

    token_id: int | None
    text: str  # what became certain with it; all texts together are the result's
    drafted: bool = False  # an accepted candidate, or the verifier's own
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


@dataclass
class Result:
    """A finished generation. `finish_reason`: "stop" (end token or stop string), "length" or "cancelled"."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    finish_reason: str = "length"
    stop_reason: str | int | None = None  # the stop string or the id of the end token
    accept_lengths: list[int] = field(default_factory=list)  # tokens committed by each verification pass
    logprobs: list[float] | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
