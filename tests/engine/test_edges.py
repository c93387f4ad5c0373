"""The edges: the end of the context, more threads than a machine has, threads that change, a process that forks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from quasar import Engine, GenerationSettings, Model, QuasarError, generate
from quasar.backends import get_backend
from quasar.engine.settings import MAX_GAMMA
from tests.helpers.random_models import random_model

CAPACITY = 64
DRAFTS = ("ngram", "suffix", "hybrid", "recycling", "text", "corpus", "self:skip=1")
GAMMAS = (None, *range(1, MAX_GAMMA + 1))


@cache
def small(precision: str) -> Model:
    """A model whose context is short, with its full-precision weights kept."""
    return random_model(
        "qwen3", precision, True, backend=get_backend("cpu"), num_hidden_layers=3, max_position_embeddings=CAPACITY
    )


@cache
def whole(precision: str) -> list[int]:
    """A prompt and all that the model says until its context is full: every longer prompt's answer too."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 3
    answer = generate(small(precision), prompt, max_new_tokens=CAPACITY, draft="none").result()
    assert answer.finish_reason == "length"
    assert len(prompt) + len(answer.token_ids) == CAPACITY
    return prompt + answer.token_ids


def settings(at: int, draft: str, **more: object) -> GenerationSettings:
    """gamma goes through all its values as `at` does."""
    return GenerationSettings(max_new_tokens=CAPACITY, draft=draft, gamma=GAMMAS[at % len(GAMMAS)], **more)


@pytest.mark.parametrize("draft", DRAFTS)
def test_prompts_of_every_length_up_to_the_context(draft: str) -> None:
    for length in range(CAPACITY - 40, CAPACITY):
        asked = settings(length * 5 + len(draft), draft)
        assert generate(small("w8a8"), whole("w8a8")[:length], asked).result().token_ids == whole("w8a8")[length:]
    with pytest.raises(QuasarError, match="has room for 64 in all"):
        generate(small("w8a8"), whole("w8a8"), settings(0, draft))


@pytest.mark.parametrize("draft", ["none", "hybrid", "self:skip=1"])
def test_the_cascade_up_to_the_context(draft: str) -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6] * 3
    full = small("w8a8").with_decoder(small("w8a8").full, "full")
    text += generate(full, text, max_new_tokens=CAPACITY, draft="none").result().token_ids
    for length in range(CAPACITY - 40, CAPACITY):
        asked = settings(length, draft, lossless=True)
        assert generate(small("w8a8"), text[:length], asked).result().token_ids == text[length:]


@pytest.mark.parametrize("shift", range(3))
def test_batches_up_to_the_context(shift: int) -> None:
    engine = Engine(small("w8a8"), 7, own_thread=False)
    lengths = range(CAPACITY - 40, CAPACITY)
    handles = [
        engine.submit(whole("w8a8")[:length], settings(length + 11 * shift, DRAFTS[(length + shift) % len(DRAFTS)]))
        for length in lengths
    ]
    while engine.step():
        pass
    for length, handle in zip(lengths, handles, strict=True):
        assert handle.result().token_ids == whole("w8a8")[length:]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["full", "w8a8", "w4a16"])
def test_threads_that_change_between_recordings_and_replays(precision: str) -> None:
    """300: more than the kernels take, and few passes, since every one wakes them all."""
    asked = GenerationSettings(max_new_tokens=CAPACITY, draft="hybrid", gamma=5)
    for count, length in ((1, 40), (3, 40), (2, 40), (300, CAPACITY - 4), (1, 40), (3, 40)):
        torch.set_num_threads(count)
        assert (
            generate(small(precision), whole(precision)[:length], asked).result().token_ids
            == (whole(precision)[length:])
        )


def test_300_threads_share_an_engine_and_a_model() -> None:
    """Each asks once, half of them the engine, half the model itself."""
    said: dict[int, list[int]] = {}
    with Engine(small("w8a8"), 8) as engine:

        def ask(number: int) -> None:
            length = CAPACITY - 20 + number % 20
            asked = settings(number, DRAFTS[number % len(DRAFTS)])
            if number % 2:
                handle = engine.submit(whole("w8a8")[:length], asked)
            else:
                handle = generate(small("w8a8"), whole("w8a8")[:length], asked)
            said[number] = handle.result().token_ids

        workers = [threading.Thread(target=ask, args=(number,)) for number in range(300)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    assert len(said) == 300
    assert all(ids == whole("w8a8")[CAPACITY - 20 + number % 20 :] for number, ids in said.items())


FORKS = """
import os, signal, threading, time, torch
from quasar import Engine, QuasarError, generate, load
torch.set_num_threads(2)
model = load("tiny-qwen3", device="cpu", precision="full")
say = lambda: generate(model, "def main():", max_new_tokens=12).result().token_ids
expected, engine = say(), Engine(model, 2)
engine.submit("import", max_new_tokens=2).result()
held = threading.Event()
def hold():
    with model.runtime.lock:
        held.set()
        time.sleep(120)
threading.Thread(target=hold, daemon=True).start()
held.wait()
if not os.fork():
    signal.alarm(60)
    assert say() == expected
    with Engine(model, 2) as own:
        assert own.submit("def main():", max_new_tokens=12).result().token_ids == expected
    try:
        engine.submit("import")
    except QuasarError as error:
        print(error, flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks on this system")
def test_a_forked_process_says_the_same() -> None:
    """OpenMP's threads and an engine's stay behind in the parent."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS], cwd=root, capture_output=True, text=True, timeout=120
    )
    refused = "this process was forked off the one whose thread runs this engine; make an engine here"
    assert (done.stdout.split("\n"), done.stderr) == ([refused, "0", ""], "")
