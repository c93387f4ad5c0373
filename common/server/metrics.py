"""Prometheus metrics: under vLLM's names where it has them, ours beside under `quasar:`."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from quasar.engine.settings import Result

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Sequence(Protocol):
    """A sequence that the engine is done with: `quasar.server.jobs.Job`."""

    submitted: float
    first_token: float

    def outcome(self) -> Result | None: ...


_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SLOW = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)


class Metrics:
    """The counters of one server."""

    def __init__(self, model: str, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._engine = engine
        self._per_position: Tally[int] = Tally()
        self._last: Any = None  # the sequence that ended last: what one pass reads
        own = {"registry": self.registry, "labelnames": ["model_name"]}

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, **own).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, **own).labels(model)

        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = counter("vllm:generation_tokens", "Tokens of output.")
        self._cached = counter("vllm:prompt_tokens_cached", "Tokens of prompts that the prefix cache held.")
        self._success = Counter(
            "vllm:request_success", "Finished sequences.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._first = histogram("vllm:time_to_first_token_seconds", "From submission to the first token.", _FAST)
        self._between = histogram("vllm:request_time_per_output_token_seconds", "Of decoding, per outcome.", _FAST)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From submission to the end.", _SLOW)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From admission to the first token.", _FAST)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _SLOW)
        self._rounds = counter("vllm:spec_decode_num_drafts", "Verification passes over a outcome.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Candidates that were verified.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Candidates that were kept.")
        self._by_source = Counter(
            "quasar:accepted_tokens_by_source",
            "Candidates that were kept, by what proposed them.",
            ["model_name", "source"],
            registry=self.registry,
        )
        self.refused = counter("quasar:requests_refused", "Requests turned away because the queue was full.")
        self.gone = counter("quasar:requests_abandoned", "Requests whose client went away.")
        self._acceptance = histogram(
            "quasar:acceptance_length",
            "Tokens committed per verification pass, per outcome.",
            (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12),
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def finished(self, job: Sequence) -> None:
        """Counts a sequence that the engine is done with."""
        outcome = job.outcome()
        if outcome is None:
            self._success.labels(self._model, "error").inc()
            return
        stats, now = outcome.stats, time.perf_counter()
        self._last = stats
        self._prompt.inc(outcome.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._generated.inc(stats.tokens)
        self._rounds.inc(stats.passes)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        for source, count in stats.accepted_by_source.items():
            self._by_source.labels(self._model, source).inc(count)
        for length in outcome.accept_lengths:
            for position in range(length - 1):
                self._per_position[position] += 1
        reason = "abort" if outcome.finish_reason == "cancelled" else outcome.finish_reason
        self._success.labels(self._model, reason).inc()
        if job.first_token:
            self._first.observe(job.first_token - job.submitted)
            self._whole.observe(now - job.submitted)
            self._prefill.observe(stats.seconds_prefill)
            self._decode.observe(stats.seconds_decode)
        if stats.tokens > 1 and stats.seconds_decode:
            self._between.observe(stats.seconds_decode / (stats.tokens - 1))
        if stats.passes:
            self._acceptance.observe(stats.acceptance_length)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """What the engine counts itself, asked for at each scrape."""
        stats = self._engine.stats()
        share = stats.kv_bytes / stats.kv_bytes_limit if stats.kv_bytes_limit else 0.0
        yield self._one(GaugeMetricFamily, "vllm:num_requests_running", "Sequences in the engine.", stats.running)
        yield self._one(GaugeMetricFamily, "vllm:num_requests_waiting", "Sequences in the queue.", stats.waiting)
        yield self._one(
            GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Share of the memory for keys and values.", share
        )
        queried, found = stats.prefix_queried_tokens, stats.prefix_cached_tokens
        yield self._one(CounterMetricFamily, "vllm:prefix_cache_queries", "Tokens looked for.", queried)
        yield self._one(CounterMetricFamily, "vllm:prefix_cache_hits", "Tokens found.", found)
        yield self._one(CounterMetricFamily, "quasar:passes", "Passes of the engine.", stats.passes)
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted candidates by their place in the draft.",
            labels=["model_name", "position"],
        )
        for position, count in sorted(self._per_position.items()):
            positions.add_metric([self._model, str(position)], count)
        yield positions
        if self._last is not None:
            name, text = "quasar:weight_bytes_per_token", "Weights read per token, of the sequence that ended last."
            yield self._one(GaugeMetricFamily, name, text, self._last.weight_bytes_per_token)

    def _one(self, kind: type, name: str, text: str, value: float) -> Any:
        family = kind(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
