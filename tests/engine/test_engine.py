"""The promise: a sequence's text depends on its prompt, its settings and the weights, on nothing else."""

from __future__ import annotations

import itertools
import os
import random
import threading
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quasar import Engine, GenerationSettings, QuasarError, generate
from quasar.backends.base import Batch, Segment
from quasar.engine import engine as engine_module
from quasar.engine.sequence import Handle
from quasar.speculation.rows import FixedRows
from tests.conftest import FAMILIES
from tests.helpers.random_models import shared_random_model
from tests.helpers.trees import trees

PRECISIONS = ("full", "w8a8", "w4a16", "w4a4")
DEVICE = "cpu"  # the reference's rows are the same promise, and slower
DRAFTS = ("none", "ngram", "suffix", "hybrid", "self:skip=1")
SCHEDULES = int(os.environ.get("QUASAR_SCHEDULES", 14))  # of ten sequences or so, for each family and precision


@cache
def alone(family: str, precision: str, prompt: tuple[int, ...], settings_: GenerationSettings) -> list[int]:
    """Ids of plain decoding by itself."""
    return generate(shared_random_model(family, precision, DEVICE), prompt, settings_).result().token_ids


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[int, ...], GenerationSettings, str, int | None, int, bool]:
    """A prompt (often with a prefix of others'), settings, drafter, gamma, when it arrives, whether it is cancelled."""
    rng = random.Random(draw(st.integers(0, 40)))
    shared = [rng.randrange(160) for _ in range(draw(st.sampled_from([0, 10, 40])))]
    piece = [rng.randrange(160) for _ in range(draw(st.integers(1, 8)))]
    prompt = tuple(shared + piece * draw(st.integers(1, 4)))
    temperature = draw(st.sampled_from([0.0, 0.0, 0.8]))
    asked = GenerationSettings(
        max_new_tokens=draw(st.integers(1, 24)),
        temperature=temperature,
        top_k=draw(st.sampled_from([0, 20])) if temperature else 0,
        seed=draw(st.integers(0, 3)) if temperature else 0,
        draft="none",
    )
    gamma = draw(st.sampled_from([None, 1, 4, 15]))
    return prompt, asked, draw(st.sampled_from(DRAFTS)), gamma, draw(st.integers(0, 12)), draw(st.integers(0, 9)) == 0


def run_schedule(engine: Engine, arrivals: list) -> list[tuple[Handle, bool]]:
    """Submits each request at its step; cancels those that are to be, two steps later."""
    waiting = sorted(enumerate(arrivals), key=lambda item: item[1][4])
    made: dict[int, Handle] = {}
    step = 0
    busy = True
    while waiting or busy:
        while waiting and waiting[0][1][4] <= step:
            index, (prompt, asked, draft, gamma, _, _) = waiting.pop(0)
            fields = {**asked.__dict__, "draft": draft, "gamma": gamma}
            made[index] = engine.submit(list(prompt), GenerationSettings(**fields))
        for index, request in enumerate(arrivals):
            if request[5] and index in made and step == request[4] + 2:
                made[index].cancel()
        busy = engine.step()
        step += 1
    return [(made[index], request[5]) for index, request in enumerate(arrivals)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(requests(), min_size=4, max_size=16), slots=st.integers(1, 6), rows=st.sampled_from([None, 3]))
def test_ids_in_any_schedule_are_the_ids_alone(family, precision, arrivals, slots, rows):
    """Arrivals, lengths, drafters, seeds, prefixes and cancellations at random."""
    model = shared_random_model(family, precision, DEVICE)
    rule = None if rows is None else FixedRows(rows)
    engine = Engine(model, max_sequences=slots, own_thread=False, row_rule=rule)
    for (handle, cancelled), (prompt, asked, *_) in zip(run_schedule(engine, arrivals), arrivals, strict=True):
        result, expected = handle.result(0), alone(family, precision, prompt, asked)
        if cancelled and result.finish_reason == "cancelled":
            assert result.token_ids == expected[: len(result.token_ids)]
        else:
            assert result.token_ids == expected
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_chunks_change_nothing(family, monkeypatch):
    model = shared_random_model(family, "w8a8")
    prompt = [i * 7 % 160 for i in range(150)]
    expected = generate(model, prompt, draft="none", max_new_tokens=12).result().token_ids
    for rows in (1, 16, 33, 149):
        monkeypatch.setattr(engine_module, "PROMPT_ROWS", rows)
        engine = Engine(model, max_sequences=2, own_thread=False)
        others = [engine.submit([3, 4, 5], max_new_tokens=30), engine.submit(prompt, max_new_tokens=12)]
        while engine.step():
            pass
        assert others[1].result(0).token_ids == expected


def test_a_prefix_is_found_and_changes_nothing():
    model = shared_random_model("qwen3", "w8a8")
    prompt = [i * 11 % 160 for i in range(60)]
    expected = [
        generate(model, [*prompt, last], draft="none", max_new_tokens=8).result().token_ids for last in (1, 2, 3)
    ]
    engine = Engine(model, max_sequences=3, own_thread=False)
    first = engine.generate([[*prompt, 1]], max_new_tokens=8)[0]
    assert first.stats.cached_tokens == 0
    # One takes the idle slot over, the other copies from it while it runs.
    results = engine.generate([[*prompt, 2], [*prompt, 3]], max_new_tokens=8)
    assert [r.stats.cached_tokens for r in results] == [60, 60]
    assert [first.token_ids, *(r.token_ids for r in results)] == expected
    again = engine.generate([[*prompt, 2]], max_new_tokens=8)[0]
    assert again.stats.cached_tokens == 60 and again.token_ids == expected[1]
    assert engine.stats().prefix_cached_tokens == 180


def test_prompts_that_arrive_together_share_their_prefix():
    model = shared_random_model("qwen3", "w8a8")
    prompt = [i * 13 % 160 for i in range(80)]
    engine = Engine(model, max_sequences=4, own_thread=False)
    results = engine.generate([[*prompt, last] for last in range(4)], max_new_tokens=4)
    assert [r.stats.cached_tokens for r in results] == [0, 80, 80, 80]


def test_memory_is_bounded():
    model = shared_random_model("qwen3", "full")
    per_position = model.runtime.kv_bytes_per_position
    engine = Engine(model, max_sequences=8, kv_bytes=300 * per_position, own_thread=False)
    most = 0
    handles = [engine.submit([1, 2, seed], max_new_tokens=60) for seed in range(12)]
    while engine.step():
        most = max(most, engine.stats().kv_bytes)
    assert 0 < most <= 300 * per_position
    assert all(len(handle.result(0).token_ids) == 60 for handle in handles)
    with pytest.raises(QuasarError, match="399 tokens of context need"):
        engine.submit([1, 2, 3], max_new_tokens=396)


def test_threads_submit_cancel_and_abandon():
    model = shared_random_model("openpangu", "w8a8", DEVICE)
    prompts = [tuple(random.Random(seed).choices(range(160), k=6)) for seed in range(16)]
    asked = GenerationSettings(max_new_tokens=16, draft="none")
    expected = [alone("openpangu", "w8a8", prompt, asked) for prompt in prompts]
    wrong: list[int] = []
    others = set(threading.enumerate())
    with Engine(model, max_sequences=4) as engine:

        def client(index: int) -> None:
            for turn in range(3):
                handle = engine.submit(list(prompts[index]), max_new_tokens=16, draft="ngram")
                if (index + turn) % 4 == 3:
                    if turn:
                        handle.cancel()
                    continue  # abandoned
                if handle.result(60).token_ids != expected[index]:
                    wrong.append(index)

        threads = [threading.Thread(target=client, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert set(threading.enumerate()) <= others


def test_an_error_in_one_pass_reaches_everyone_in_it_and_the_engine_goes_on(monkeypatch):
    model = shared_random_model("qwen3", "full")
    engine = Engine(model, max_sequences=2, own_thread=False)
    handles = [engine.submit([1, 2, 3], max_new_tokens=20) for _ in range(2)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._verifier, "step", lambda windows: 1 / 0)
        engine.step()
    for handle in handles:
        with pytest.raises(ZeroDivisionError):
            handle.result(0)
    assert len(engine.generate([[1, 2, 3]], max_new_tokens=20)[0].token_ids) == 20


def test_events_are_the_text_and_say_what_was_drafted():
    model = shared_random_model("qwen3", "w8a8")
    engine = Engine(model, max_sequences=1, own_thread=False)
    handle = engine.submit([5, 9, 31] * 4, max_new_tokens=30, gamma=5, logprobs=2, ignore_eos=True)
    while engine.step():
        pass
    events = [event for events in handle.events() for event in events]
    result = handle.result(0)
    assert [e.token_id for e in events if e.token_id is not None] == result.token_ids
    assert "".join(e.text for e in events) == result.text
    assert sum(e.drafted for e in events) == result.stats.accepted
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in events if e.token_id is not None)


def test_logprobs_are_the_same_with_and_without_drafts():
    model = shared_random_model("openpangu", "w8a8")
    results = [
        generate(model, [5, 9, 31] * 4, max_new_tokens=30, draft=draft, gamma=5, logprobs=0).result()
        for draft in ("none", "ngram")
    ]
    assert results[1].stats.accepted > 0
    assert results[0].logprobs == results[1].logprobs and len(results[0].logprobs) == 30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["reference", "cpu"])
@settings(max_examples=15)
@given(data=st.data())
def test_a_row_has_the_bits_it_has_alone(family, device, data):
    """Logits of random batches of chains and trees, against each path alone in single steps."""
    model = shared_random_model(family, data.draw(st.sampled_from(PRECISIONS)), device)
    runtime = model.runtime
    segments, expected = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(st.lists(st.integers(0, 159), min_size=1, max_size=80))
        slot = runtime.new_slot(120)
        runtime.prefill(slot, prompt, logits_to_keep=0)
        tokens, parents = data.draw(trees(tokens=160, most=9))
        segment = Segment(slot, [7, *tokens], [-1, *(parent + 1 for parent in parents)], 1 + len(tokens))
        segments.append(segment)
        for row in range(len(segment.ids)):
            single = runtime.new_slot(120)
            runtime.prefill(single, prompt, logits_to_keep=0)
            expected.append(runtime.prefill(single, [segment.ids[i] for i in segment.path(row)])[0])
    logits = runtime.run(Batch(segments))
    assert torch.equal(logits, torch.stack(expected))


def test_a_trees_path_leaves_the_cache_of_a_chain():
    runtime = shared_random_model("qwen3", "w8a8").runtime
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    slot, chain = runtime.new_slot(40), runtime.new_slot(40)
    for each in (slot, chain):
        runtime.prefill(each, prompt, logits_to_keep=0)
    #   10 -> 20 -> 40 -> 60, with 30 and 50 beside them
    runtime.run(Batch([Segment(slot, [10, 20, 30, 40, 50, 60], [-1, 0, 0, 1, 1, 3], 6)]))
    slot.commit([0, 1, 3, 5])
    runtime.prefill(chain, [10, 20, 40, 60], logits_to_keep=0)
    assert slot.length == chain.length == 12
    assert torch.equal(runtime.prefill(slot, [77]), runtime.prefill(chain, [77]))


@pytest.mark.parametrize("options", [{"draft": "ngram"}, {"draft": "ngram", "gamma": 5}, {"draft": "none"}])
def test_penalties_biases_and_minimum_lengths_work_under_drafts(options):
    model = shared_random_model("qwen3", "full")
    rules = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logit_bias": {7: 2.0}}
    plain = generate(model, [5, 9, 31] * 3, max_new_tokens=30, draft="none", **rules).result()
    unchanged = generate(model, [5, 9, 31] * 3, max_new_tokens=30, draft="none").result()
    assert plain.token_ids != unchanged.token_ids
    assert generate(model, [5, 9, 31] * 3, max_new_tokens=30, **rules, **options).result().token_ids == plain.token_ids


def test_shutdown_ends_what_runs():
    model = shared_random_model("qwen3", "full")
    engine = Engine(model, max_sequences=2)
    handle = engine.submit([1, 2, 3], max_new_tokens=300)
    engine.shutdown(wait_seconds=0)
    assert handle.done and handle.result().finish_reason in ("cancelled", "length")
    with pytest.raises(QuasarError, match="shutting down"):
        engine.submit([1, 2, 3])


def test_one_slow_pass_does_not_cut_all_prompts_small(monkeypatch):
    """A prompt beside a decoding sequence comes in few rows after a pass of a second, and whole after a quick one."""
    clock = itertools.count(step=0.001)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine = Engine(shared_random_model("qwen3", "w8a8", DEVICE), 2, own_thread=False)
    engine.submit([1, 2, 3], max_new_tokens=60, ignore_eos=True, draft="none")
    engine.step()
    engine._prompt_row_seconds = 1.0
    handle = engine.submit(list(range(100, 150)), max_new_tokens=1, draft="none")
    steps = 0
    while not handle.done:
        engine.step()
        steps += 1
    assert steps == 2
    engine.shutdown()
