"""What broke under speculation in other servers, each as a test of ours. docs/serving.md lists them."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.serving import Live, ScriptedEngine, chat, gathered, until

from quasar import Engine, GenerationSettings, Model
from quasar.server.service import ServerOptions

CODE = "def read(path):\n    with open(path) as f:\n        return f.read()\n\ndef write(path):"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def plain(chat_model: Model) -> Iterator[Live]:
    """The real engine without drafts."""
    with Live(chat_model, Engine(chat_model, 4), ServerOptions(draft="none")) as server:
        yield server


@pytest.mark.parametrize("prompt", [CODE, "import os\nimport sys\nimport os\nimport sys\nimport"])
def test_greedy_text_does_not_differ_with_drafts(live: Live, plain: Live, prompt: str) -> None:
    """vLLM 41758, mlx-lm 846."""
    wish = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "return_token_ids": True, "return_metrics": True}
    drafted, own = live.post("/v1/completions", wish), plain.post("/v1/completions", wish)
    assert drafted["choices"][0]["token_ids"] == own["choices"][0]["token_ids"]
    assert drafted["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
    assert own["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


def test_sampled_text_does_not_differ_with_drafts(live: Live, plain: Live) -> None:
    wish = {"prompt": CODE, "max_tokens": 40, "temperature": 0.8, "seed": 5, "return_token_ids": True}
    ids = [server.post("/v1/completions", wish)["choices"][0]["token_ids"] for server in (live, plain)]
    assert ids[0] == ids[1]


def test_logprobs_of_drafted_tokens_are_the_verifiers(live: Live, plain: Live) -> None:
    """llama.cpp 27972: drafted tokens had log-probability 0.0."""
    wish = {"prompt": CODE, "max_tokens": 40, "temperature": 0, "logprobs": 3, "return_metrics": True}
    drafted, own = live.post("/v1/completions", wish), plain.post("/v1/completions", wish)
    assert drafted["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
    assert drafted["choices"][0]["logprobs"] == own["choices"][0]["logprobs"]
    scores = drafted["choices"][0]["logprobs"]["token_logprobs"]
    assert sum(score == 0.0 for score in scores) < len(scores) / 4, (
        "a certain token may round to 0.0, not all of a draft"
    )


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls_are_not_lost_or_cut_in_a_draft(script: Callable[..., Live], batch: int, stream: bool) -> None:
    """vLLM 56077 and 40875: calls that arrived with several tokens at once."""
    server = script(f"I look.\n{CALL}\n{CALL}", batch=batch)
    wish = chat(tools=TOOLS)
    if stream:
        message = gathered(server.stream("/v1/chat/completions", wish))
        assert message["finish_reason"] == "tool_calls"
        calls = message["tool_calls"]
    else:
        choice = server.post("/v1/chat/completions", wish)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        calls = [call["function"] for call in message["tool_calls"]]
    assert message["content"] == "I look."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("weather", {"city": "Bonn"})] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_no_ids_past_a_stop_string(script: Callable[..., Live], stream: bool) -> None:
    """vLLM 47616: tokens of the draft behind the stop string were handed out."""
    server = script("one two STOP three four five", batch=100)
    wish = chat(stop=["STOP"], logprobs=True, return_token_ids=True)
    if stream:
        chunks = server.stream("/v1/chat/completions", wish)
        ids = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids", [])]
        message = gathered(chunks)
        text, scored = message["content"], message["logprobs"]
    else:
        choice = server.post("/v1/chat/completions", wish)["choices"][0]
        ids, text, scored = choice["token_ids"], choice["message"]["content"], choice["logprobs"]["content"]
    assert text == "one two "
    assert "three" not in server.model.decode(ids)
    assert "".join(entry["token"] for entry in scored).startswith("one two")
    assert not any("STOP" in entry["token"] for entry in scored)


def test_a_grammar_takes_the_end_token_in_a_draft(live: Live) -> None:
    """openvino.genai 4081."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["yes", "no"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(3):
        answer = live.post(
            "/v1/chat/completions",
            chat(max_tokens=60, temperature=seed / 2, seed=seed, response_format=form, return_metrics=True),
        )
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("yes", "no")
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0, "forced tokens are drafts"


def test_a_grammar_gives_the_same_text_with_and_without_drafts(live: Live, plain: Live) -> None:
    wish = {
        "prompt": "x =",
        "max_tokens": 40,
        "temperature": 0.9,
        "seed": 3,
        "response_format": {"type": "json_object"},
    }
    texts = [server.post("/v1/completions", wish)["choices"][0]["text"] for server in (live, plain)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("{")


def test_reasoning_stands_under_both_names(script: Callable[..., Live]) -> None:
    """vLLM 50624: one of the names was dropped, and its clients lost the thinking."""
    server = script("<think>\nHm. Well.\n</think>\n\nYes.", batch=2)
    message = server.post("/v1/chat/completions", chat())["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Hm. Well."
    assert message["content"] == "Yes."
    streamed = gathered(server.stream("/v1/chat/completions", chat()))
    assert (streamed["reasoning_content"], streamed["content"]) == ("Hm. Well.", "Yes.")


def test_chat_template_kwargs_reach_the_template(live: Live) -> None:
    """llama.cpp 13160."""
    wish = {"messages": chat()["messages"]}
    thinking = live.post("/tokenize", wish)["tokens"]
    straight = live.post("/tokenize", wish | {"chat_template_kwargs": {"enable_thinking": False}})["tokens"]
    assert "</think>" in live.model.decode(straight)
    assert "</think>" not in live.model.decode(thinking)
    assert live.post("/v1/chat/completions", chat(max_tokens=1, chat_template_kwargs={"enable_thinking": False}))[
        "usage"
    ]["prompt_tokens"] == len(straight)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_client_that_goes_away_frees_its_slot(script: Callable[..., Live], path: str, stream: bool) -> None:
    """ATOM 1441, mini-sglang 15: requests that do not stream went on to their end."""
    server = script("word " * 200, hold=9)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat(n=2),
        "/v1/completions": {"prompt": "x", "max_tokens": 100},
        "/v1/responses": {"input": "x"},
        "/v1/messages": chat(model="tiny-qwen3", max_tokens=100),
    }
    connection = server.connect()
    connection.request(
        "POST", path, json.dumps(bodies[path] | {"stream": stream}), {"content-type": "application/json"}
    )
    until(lambda: server.engine.handles and server.engine.handles[0].passes_done)
    assert not server.engine.handles[0].over
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: all(handle.over for handle in server.engine.handles))
    assert all(handle.cancelled for handle in server.engine.handles)
    until(lambda: server.service.jobs.live == 0)


def test_a_client_that_goes_away_frees_a_slot_of_the_real_engine(live: Live) -> None:
    connection = live.connect()
    wish = {"prompt": CODE, "max_tokens": 1500, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(wish), {"content-type": "application/json"})
    until(lambda: live.engine.stats().running == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: live.engine.stats().running == 0)


def test_acceptance_does_not_fall_to_nothing_after_a_while(live: Live) -> None:
    """vllm-ascend 10118."""
    wish = {"prompt": CODE * 6, "max_tokens": 240, "temperature": 0, "ignore_eos": True, "return_pieces": True}
    pieces = live.post("/v1/completions", wish)["choices"][0]["pieces"]
    assert sum(piece["drafted"] for piece in pieces[len(pieces) // 2 :]) > 0


def test_candidates_that_do_not_pay_are_not_verified(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 19254 and 16258: speculation made decoding slower. Where every row costs as much as a pass of its own, and
    the drafter is mostly wrong, hardly a candidate is verified."""
    monkeypatch.setattr(live.engine, "_seconds", lambda rows: float(rows))
    wish = {"prompt": "x y z x y q x y", "max_tokens": 60, "temperature": 1.5, "seed": 2, "return_metrics": True}
    told = live.post("/v1/completions", wish)["metrics"]["speculative_decoding"]
    assert told["num_draft_tokens"] <= 10
    assert told["num_spec_steps"] >= 45


def test_a_slow_reader_holds_nobody_up(script: Callable[..., Live]) -> None:
    """Its tokens wait in the server; others get theirs, and it gets all of its own in the end."""
    text = "word " * 300
    server = script(text, batch=1, max_sequences=8)
    slow = server.connect()
    slow.request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)), {"content-type": "application/json"})
    for _ in range(3):
        assert server.post("/v1/chat/completions", chat())["choices"][0]["message"]["content"] == text
    answer = slow.getresponse()
    chunks = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    assert gathered(chunks)["content"] == text
    slow.close()


def test_sixteen_random_clients_get_the_text_they_would_get_alone(live: Live) -> None:
    """arXiv 2510.22876: batches whose sequences accept unevenly corrupted the output. A tenth of the requests here
    goes away in the middle, a tenth is garbage."""
    dice = random.Random(11)
    starts = ["def main():", "import os", CODE, "class Stack:\n    def push(self, item):", "for i in range(10):"]
    wishes = []
    for i in range(64):
        wish: dict[str, Any] = {"prompt": dice.choice(starts) + " " * (i % 3), "max_tokens": dice.randint(1, 24)}
        wish |= {"temperature": dice.choice([0, 0, 0.7, 1.2]), "seed": dice.randrange(50), "return_token_ids": True}
        wish |= dice.choice([{}, {}, {"top_p": 0.8}, {"top_k": 20}, {"frequency_penalty": 0.5}, {"logprobs": 2}])
        wishes.append(wish)
    engine = Engine(live.model, 1)
    alone: dict[int, list[int]] = {}

    def run(i: int) -> list[int] | None:
        wish = wishes[i]
        if i % 10 == 3:
            connection = live.connect()
            more = wish | {"max_tokens": 400, "stream": bool(i % 4)}
            connection.request("POST", "/v1/completions", json.dumps(more), {"content-type": "application/json"})
            time.sleep(0.05)
            connection.close()
            return None
        if i % 10 == 7:
            junk = dice.choice([b"{", b"\xff\xfe", json.dumps(wish | {"top_p": 7}).encode(), b"[]", b""])
            assert live.request("POST", "/v1/completions", junk)[0] == 400
            return None
        if i % 2:
            chunks = live.stream("/v1/completions", wish)
            return [t for chunk in chunks for choice in chunk["choices"] for t in choice.get("token_ids", [])]
        return live.post("/v1/completions", wish)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(run, range(len(wishes))))
    checked = [i for i, ids in enumerate(together) if ids is not None]
    for i in dice.sample(checked, 16):
        wish = wishes[i]
        settings = {
            name: wish[name] for name in ("temperature", "seed", "top_p", "top_k", "frequency_penalty") if name in wish
        }
        ids = live.model.encode(wish["prompt"])
        alone[i] = (
            engine.submit(ids, GenerationSettings(max_new_tokens=wish["max_tokens"], draft="none", **settings))
            .result()
            .token_ids
        )
    engine.shutdown()
    assert {i: together[i] for i in alone} == alone
    until(lambda: live.service.jobs.live == 0)
    assert live.engine.stats().running == 0


def test_prompts_that_wait_for_others_are_read_in_their_turn(live: Live) -> None:
    """More prompts at once than one pass takes rows of: the engine lost its count and failed all of them."""
    prompts = ["".join(f"v{i}_{j} = {j}\n" for j in range(60)) for i in range(8)]
    wish = {"max_tokens": 6, "temperature": 0, "return_token_ids": True}

    def ids(prompt: str) -> list[int]:
        return live.post("/v1/completions", wish | {"prompt": prompt})["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ids, prompts))
    assert together == [ids(prompt) for prompt in prompts]


def test_a_stream_ends_when_the_engine_fails(script: Callable[..., Live]) -> None:
    server = script("word " * 50, hold=5)
    events = server.events("/v1/chat/completions", chat())
    next(events)
    threading.Timer(0.1, server.engine.handles[0].cancel).start()
    rest = list(events)
    assert rest[-1]["error"]["code"] == "shutting_down"


def test_garbage_on_the_wire_does_no_harm(live: Live) -> None:
    for junk in (
        b"\x00\xff\x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: nope\r\n\r\n",
        b"GET " + b"a" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as raw:
            raw.sendall(junk)
            raw.settimeout(2)
            with contextlib.suppress(ConnectionResetError, TimeoutError):  # it may wait for the rest of a line
                raw.recv(1000)
    assert live.get("/health") == {"status": "ok"}
    assert isinstance(live.connect(), http.client.HTTPConnection)


def test_the_scripted_engine_says_its_text(thinking_model: Model) -> None:
    heard: list[Any] = []
    engine = ScriptedEngine(thinking_model, "one two three")
    engine.submit([1], GenerationSettings(), on_events=heard.append)
    until(lambda: heard and heard[-1] is None)
    assert "".join(event.text for events in heard[:-1] for event in events) == "one two three"
    engine.shutdown()
