"""What all endpoints share: the model and its texts, settings of a request, figures of a response."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quasar.engine.settings import GenerationSettings
from quasar.errors import QuasarError
from quasar.models.chat import OPENPANGU, render_chat, splitter_for, think_markers
from quasar.models.model import Model
from quasar.server import protocol
from quasar.server.answers import AnswerParser
from quasar.server.errors import ApiError
from quasar.server.jobs import EngineLike, Job, Jobs
from quasar.server.metrics import Metrics
from quasar.server.tokens import TokenTexts

T = TypeVar("T")
# Arguments of transformers' apply_chat_template that are no variables of a template; a request's template is none.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "think",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves; the command line sets it."""

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 4 * 2**20
    default_max_tokens: int = 4096  # of a chat that names no limit
    draft: str | None = None  # None: the settings' own
    gamma: int | None = None
    text_seconds: float = 20.0  # a template, a tokenizer or a grammar may take so long
    body_seconds: float = 60.0  # a client may take so long to send its request
    hosts: tuple[str, ...] | None = None  # names in the Host header that are answered; None: all
    name: str | None = None  # of the model in responses; None: the model's own
    defaults: Mapping[str, float] = field(default_factory=dict)  # sampling, from generation_config.json


class Service:
    """One model behind its endpoints."""

    def __init__(self, model: Model, engine: EngineLike, options: ServerOptions) -> None:
        self.model = model
        self.engine = engine
        self.options = options
        self.name = options.name or model.name.rstrip("/").rsplit("/", 1)[-1]
        self.created = int(time.time())
        self.metrics = Metrics(self.name, engine)
        self.jobs = Jobs(engine, options.max_queue, self.metrics)
        self.texts = TokenTexts(model.tokenizer)
        self.context = model.config.max_position_embeddings
        self.markers = think_markers(model.tokenizer)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="quasar-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="quasar-scoring")
        self._grammars: Any = None

    # Texts.

    async def apart(self, work: Callable[[], T], param: str | None) -> T:
        """Runs what may take long outside the event loop, for a bounded time."""
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._threads, work), self.options.text_seconds)
        except asyncio.TimeoutError:
            limit = f"{self.options.text_seconds:g} seconds"
            raise ApiError(f"'{param}' takes longer than {limit} to prepare", param=param) from None

    async def unhurried(self, work: Callable[[], T]) -> T:
        """Runs work of the model's own outside the event loop, however long it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._long, work)

    def close(self) -> None:
        self._long.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served."""
        if name is not None and name not in (self.name, self.model.name):
            message = f"the model '{name}' does not exist here; this server has '{self.name}'"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text."""
        if self.model.tokenizer is None:
            raise ApiError(f"{self.name} has no tokenizer; give token ids", param="prompt")
        encode = self.model.tokenizer.encode
        return await self.apart(lambda: list(encode(text, add_special_tokens=special)), "prompt")

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(ids)

    async def render(
        self,
        messages: Sequence[protocol.Message],
        tools: Sequence[protocol.Tool] = (),
        kwargs: Mapping[str, Any] | None = None,
        effort: str | None = None,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's template."""
        tokenizer = self.model.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ApiError(f"{self.name} has no chat template; use /v1/completions", param="messages")
        variables = dict(kwargs or {})
        if refused := sorted(_RESERVED & variables.keys()):
            raise ApiError(
                f"chat_template_kwargs: {refused[0]!r} is no variable of a template", param="chat_template_kwargs"
            )
        if tools and "tools" not in str(tokenizer.chat_template):
            raise ApiError(f"the chat template of {self.name} knows no tools", param="tools")
        turns = [_turn(message) for message in messages]
        if tools:
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        think = None
        template = str(tokenizer.chat_template)
        switches = self.markers == OPENPANGU or ("enable_thinking" in template and "enable_thinking" not in variables)
        if effort in ("none", "minimal") and self.markers is not None and switches:
            think = "fast"

        def work() -> list[int]:
            try:
                return render_chat(tokenizer, turns, think=think, **variables, **options)
            except QuasarError as error:
                raise ApiError(str(error), param="messages") from None
            except Exception as error:  # a template may raise anything about a conversation that it was not made for
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise ApiError(f"the chat template cannot take these messages: {reason}", param="messages") from None

        return await self.apart(work, "messages")

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for a prompt that leaves no room for a token, or has ids that the model does not know."""
        if len(ids) >= self.context:
            message = f"this model's context is {self.context} tokens; '{param}' has {len(ids)} and leaves no room"
            raise ApiError(message, param=param, code="context_length_exceeded")
        if not ids:
            raise ApiError(f"'{param}' is empty; give at least one token", param=param)
        self.check_ids(ids, param)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for ids that the model does not know."""
        size = self.model.config.vocab_size
        wrong = next((i for i in ids if i >= size), None)
        if wrong is not None:
            raise ApiError(f"'{param}': token id {wrong} is outside the vocabulary, 0 to {size - 1}", param=param)

    def parser(self, prompt: Sequence[int], tools: bool, thinks: bool = True) -> AnswerParser:
        """What reads this prompt's answer."""
        splitter = splitter_for(self.model.tokenizer if thinks else None, prompt)
        return AnswerParser(splitter, tools)

    # Settings.

    def settings(
        self, wishes: protocol.Sampling, prompt: Sequence[int], most: int | None, **more: Any
    ) -> GenerationSettings:
        """The engine's settings for one sequence. most: tokens of output."""
        room = self.context - len(prompt)
        given = {
            name: value
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
            if (value := getattr(wishes, name)) is not None
        }
        values = {"temperature": 1.0, **self.options.defaults, **given}
        top_k = wishes.top_k if wishes.top_k is not None else self.options.defaults.get("top_k", 0)
        for name, ids in (("logit_bias", wishes.logit_bias), ("stop_token_ids", wishes.stop_token_ids)):
            self.check_ids([int(i) for i in ids or ()], name)
        values |= {"top_k": max(0, int(top_k))}
        if self.options.draft is not None:
            values["draft"] = self.options.draft
        try:
            return GenerationSettings(
                **values,
                max_new_tokens=max(1, min(room, most if most is not None else self.options.default_max_tokens)),
                gamma=self.options.gamma,
                stop=wishes.stops(),
                stop_token_ids=tuple(wishes.stop_token_ids or ()),
                min_new_tokens=wishes.min_tokens or 0,
                logit_bias={int(k): v for k, v in (wishes.logit_bias or {}).items()},
                ignore_eos=bool(wishes.ignore_eos),
                lossless=getattr(self.engine, "lossless", False),
                **more,
            )
        except QuasarError as error:
            raise ApiError(str(error)) from None

    @staticmethod
    def seeds(seed: int | None, count: int) -> list[int]:
        """A seed for each choice: the first choice's is the request's own."""
        first = secrets.randbits(62) if seed is None else seed
        return [(first + i) % 2**63 for i in range(count)]

    def grammars(self) -> Any:
        """Made at the first request that needs them."""
        if self._grammars is None:
            from quasar.server.grammar import Grammars

            if self.model.tokenizer is None:
                raise ApiError(f"{self.name} has no tokenizer, so it cannot follow a format", param="response_format")
            self._grammars = Grammars(self.model.tokenizer, self.model.config.vocab_size, self.model.stop_ids)
        return self._grammars

    async def matchers(self, kind: str, what: Any, prompt: Sequence[int], count: int, param: str) -> list[Any]:
        """A grammar's states for `count` sequences; kind: a method of Grammars, what: its argument."""

        def work() -> list[Any]:
            grammars = self.grammars()
            if kind == "json_object":
                text = grammars.json_object()
            elif kind == "json_schema":
                text = grammars.json_schema(what, param)
            else:
                text = grammars.tool_calls(*what)
            thinking, inside = self._thinking_ids(), self._opens_inside(prompt)
            return [grammars.matcher(text, thinking, inside) for _ in range(count)]

        return await self.apart(work, param)

    def _thinking_ids(self) -> tuple[int, int] | None:
        if self.markers is None:
            return None
        convert = self.model.tokenizer.convert_tokens_to_ids
        return convert(self.markers.open), convert(self.markers.close)

    def _opens_inside(self, prompt: Sequence[int]) -> bool:
        if self.markers is None:
            return False
        tail = self.model.tokenizer.decode(list(prompt)[-8:], skip_special_tokens=False).rstrip()
        return tail.endswith(self.markers.open)

    # Figures.

    def usage(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int]], reasoning: int = 0) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once however many choices it has."""
        prompt = sum(map(len, prompts))
        completion = sum(job.tokens for job in jobs)
        cached: dict[int, int] = {}
        for job in jobs:  # of the choices of a prompt the one that found least: the others found the first one's
            if job.result is not None:
                key, found = id(job.shared_prompt), job.result.stats.cached_tokens
                cached[key] = min(cached.get(key, found), found)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def timings(self, job: Job) -> dict[str, Any]:
        """llama.cpp's `timings`, so far or at the end, with passes and bytes beside."""
        now = time.perf_counter()
        stats = job.result.stats if job.result is not None else None
        prompt_seconds = stats.seconds_prefill if stats else max(0.0, (job.first_token or now) - job.submitted)
        seconds = stats.seconds_decode if stats else max(0.0, now - job.first_token) if job.first_token else 0.0
        cached, read = (stats.cached_tokens if stats else 0), len(job.prompt)
        passes = stats.passes if stats else job.passes
        length = (job.tokens - 1) / passes if passes else 1.0
        bytes_ = stats.weight_bytes_per_token if stats else self.model.decoder.weight_bytes_per_pass / max(length, 1.0)
        return {
            "cache_n": cached,
            "prompt_n": read - cached,
            "prompt_ms": 1e3 * prompt_seconds,
            "prompt_per_second": (read - cached) / prompt_seconds if prompt_seconds else 0.0,
            "predicted_n": job.tokens,
            "predicted_ms": 1e3 * seconds,
            "predicted_per_second": (job.tokens - 1) / seconds if seconds else 0.0,
            "draft_n": stats.drafted if stats else None,
            "draft_n_accepted": stats.accepted if stats else job.accepted,
            "passes": passes,
            "acceptance_length": length,
            "weight_bytes_per_token": bytes_,
        }

    def speculation(self, job: Job) -> dict[str, Any]:
        """vLLM's `metrics` object of a finished sequence, with what it does not have beside."""
        assert job.result is not None
        stats, lengths = job.result.stats, job.result.accept_lengths
        histogram = [0] * max(lengths, default=1)
        for length in lengths:
            histogram[length - 1] += 1
        return {
            "speculative_decoding": {
                "mean_acceptance_length": stats.acceptance_length,
                "draft_acceptance_rate": stats.accepted / stats.drafted if stats.drafted else 0.0,
                "acceptance_histogram": histogram,
                "num_spec_steps": stats.passes,
                "num_accepted_draft_tokens": stats.accepted,
                "num_draft_tokens": stats.drafted,
            },
            "tokens_per_second": stats.tokens_per_second,
            "weight_bytes_per_token": stats.weight_bytes_per_token,
            "cached_tokens": stats.cached_tokens,
            "accepted_by_source": dict(getattr(stats, "accepted_by_source", {})),
        }


def _turn(message: protocol.Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text(),
    }
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    reasoning = message.reasoning_content or message.reasoning
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": reasoning}
    return turn | {key: value for key, value in optional.items() if value is not None}


def _arguments(text: str) -> Any:
    """Templates write arguments with a filter of their own, so they want the object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


Endpoint = Callable[[Any], Awaitable[Any]]
