"""Endpoints and parameters, errors by name, keys, limits, shutdown."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers.serving import Live, chat, gathered, until

from quasar.server.service import ServerOptions

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PROMPT = "def main():"


def test_models_and_health(live: Live) -> None:
    (model,) = live.get("/v1/models")["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny-qwen3", "model", 2048)
    assert live.get("/v1/models/tiny-qwen3") == model
    assert live.request("GET", "/v1/models/other")[0] == 404
    assert live.get("/health") == {"status": "ok"}


def test_a_completion_is_the_engines_text(live: Live) -> None:
    answer = live.post(TEXT, {"prompt": PROMPT, "max_tokens": 12, "temperature": 0})
    expected = live.engine.submit(PROMPT, max_new_tokens=12).result()
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert answer["usage"]["completion_tokens"] == 12
    streamed = live.stream(
        TEXT, {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream_options": {"include_usage": True}}
    )
    assert "".join(c["choices"][0]["text"] for c in streamed[:-1]) == expected.text
    assert streamed[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in streamed[:-1])


def test_a_chat(live: Live) -> None:
    wish = chat(PROMPT, max_completion_tokens=10, temperature=0, stream_options={"include_usage": True})
    chunks = live.stream(CHAT, wish)
    del wish["stream_options"]
    answer = live.post(CHAT, wish)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"] == gathered(chunks)["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_and_choices(live: Live) -> None:
    wish = {"prompt": [PROMPT, "import"], "n": 2, "max_tokens": 6, "temperature": 0.9, "seed": 4}
    choices = live.post(TEXT, wish)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    again = live.post(TEXT, {"prompt": "import", "n": 1, "max_tokens": 6, "temperature": 0.9, "seed": 4})["choices"]
    assert again[0]["text"] == choices[2]["text"], "the seed decides, not the company"
    assert choices[0]["text"] != choices[1]["text"]
    streamed = live.stream(TEXT, wish)
    texts = ["".join(c["text"] for chunk in streamed for c in chunk["choices"] if c["index"] == i) for i in range(4)]
    assert texts == [choice["text"] for choice in choices]


def test_choices_share_their_prompt(live: Live) -> None:
    prompt = "".join(f"x{i} = {i}\n" for i in range(60))
    answer = live.post(TEXT, {"prompt": prompt, "n": 3, "max_tokens": 4, "return_metrics": True})
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == len(live.model.encode(prompt)), "a prompt counts once"
    again = live.post(TEXT, {"prompt": prompt, "max_tokens": 4})
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_logprobs(live: Live) -> None:
    choice = live.post(CHAT, chat(PROMPT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3))["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"], "greedy takes the likeliest"
        assert len(entry["top_logprobs"]) == 3
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    streamed = gathered(live.stream(CHAT, chat(PROMPT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)))
    assert streamed["logprobs"] == content


def test_echo_scores_the_prompt(live: Live) -> None:
    ids = live.model.encode(PROMPT)
    answer = live.post(TEXT, {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0})
    scores = answer["choices"][0]["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert len(scores["token_logprobs"]) == len(ids) + 1
    assert answer["choices"][0]["text"].startswith(PROMPT)
    longer = live.post(TEXT, {"prompt": ids[:-1], "max_tokens": 1, "logprobs": 20, "temperature": 0})
    best = longer["choices"][0]["logprobs"]["top_logprobs"][0]
    last = scores["tokens"][len(ids) - 1]
    if last in best:
        assert best[last] == pytest.approx(scores["token_logprobs"][len(ids) - 1], abs=1e-4)
    alone = live.post(TEXT, {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1})["choices"][0]
    assert alone["text"] == PROMPT
    assert alone["logprobs"]["token_logprobs"] == scores["token_logprobs"][:-1]


def test_parameters_that_steer(live: Live) -> None:
    def text(**more: Any) -> str:
        return live.post(TEXT, {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | more)["choices"][0]["text"]

    def ids(**more: Any) -> list[int]:
        wish = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True} | more
        return live.post(TEXT, wish)["choices"][0]["token_ids"]

    plain = text()
    word = plain.strip().split()[0][:4]
    assert text(stop=[word]) == plain[: plain.index(word)]
    first = ids()[0]
    assert ids(logit_bias={str(first): -100})[0] != first
    assert ids(logit_bias={"77": 100})[:2] == [77, 77]
    assert text(max_tokens=30, frequency_penalty=2.0) != text(max_tokens=30)
    assert text(max_tokens=30, repetition_penalty=2.0) != text(max_tokens=30)
    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    assert text(temperature=1.5, top_k=1) == text(temperature=1.5, top_p=0.0001) == plain
    assert text(temperature=1.5, min_p=1.0) == plain
    assert ids(stop_token_ids=[first]) == [first]
    assert first not in ids(stop_token_ids=[first], min_tokens=3)[:3]


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}},
            "response_format",
        ),
    ],
)
def test_wrong_parameters_are_named(live: Live, wish: dict[str, Any], param: str) -> None:
    for path, base in ((CHAT, chat()), (TEXT, {"prompt": PROMPT})):
        error = live.error(path, base | wish)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert param.split("[")[0].split(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("path", "wish", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (CHAT, chat(top_logprobs=3), "top_logprobs"),
        (CHAT, chat(top_logprobs=21, logprobs=True), "top_logprobs"),
        (CHAT, chat(tool_choice="required"), "tool_choice"),
        (CHAT, chat(chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs"),
        (CHAT, chat("x " * 3000), "messages"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": ""}, "prompt"),
        (TEXT, {"prompt": [5000]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": "x", "best_of": 3}, "best_of"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
        (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        (TEXT, {"prompt": [1] * 2048}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [9999]}, "tokens"),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
    ],
)
def test_wrong_requests_are_named(live: Live, path: str, wish: dict[str, Any], param: str) -> None:
    error = live.error(path, wish)
    got = error["param"] or ""
    assert got.split("[")[0] == param.split("[")[0], error


def test_other_models_do_not_exist(live: Live) -> None:
    error = live.error(TEXT, {"model": "gpt-9", "prompt": "x"}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": NaN}'],
)
def test_bodies_that_are_no_requests(live: Live, body: bytes) -> None:
    status, _, answer = live.request("POST", TEXT, body)
    assert status == 400
    assert json.loads(answer)["error"]["message"]


def test_paths_and_methods(live: Live) -> None:
    assert live.error("/v1/nothing", {}, 404)["message"]
    status, headers, _ = live.request("GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")


def test_tokens(live: Live) -> None:
    told = live.post("/tokenize", {"prompt": "def é", "return_token_strs": True})
    assert told["tokens"] == live.model.encode("def é")
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert live.post("/detokenize", {"tokens": told["tokens"]}) == {"prompt": "def é"}
    rendered = live.post("/tokenize", chat("Hi") | {"add_generation_prompt": False})["tokens"]
    assert live.model.tokenizer.decode(rendered).endswith("Hi<|im_end|>\n")


def test_metrics_have_vllms_names(live: Live) -> None:
    live.post(TEXT, {"prompt": "x = 1\nx = 1\nx = 1\n", "max_tokens": 20, "temperature": 0})
    until(lambda: live.service.jobs.live == 0)
    text = live.request("GET", "/metrics")[2].decode()
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_success_total",
        "quasar:acceptance_length_bucket",
        "quasar:accepted_tokens_by_source_total",
        "quasar:weight_bytes_per_token",
    ):
        assert f'\n{name}{{model_name="tiny-qwen3"' in text or f"\n{name}{{" in text, name


def test_figures_on_request(live: Live) -> None:
    wish = {"prompt": "x = 1\nx = 1\nx = 1\n", "max_tokens": 24, "temperature": 0}
    wish |= {"return_metrics": True, "timings_per_token": True, "return_pieces": True}
    answer = live.post(TEXT, wish)
    told, times = answer["metrics"]["speculative_decoding"], answer["timings"]
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] == times["passes"]
    assert told["num_accepted_draft_tokens"] == times["draft_n_accepted"] <= told["num_draft_tokens"]
    assert told["mean_acceptance_length"] == pytest.approx(23 / times["passes"])
    assert times["predicted_n"] == 24
    pieces = answer["choices"][0]["pieces"]
    assert "".join(piece["text"] for piece in pieces) == answer["choices"][0]["text"]
    chunks = live.stream(TEXT, wish)
    assert "metrics" in chunks[-1]
    assert chunks[0]["timings"]["predicted_n"] <= chunks[-1]["timings"]["predicted_n"] == 24
    assert "metrics" not in live.post(TEXT, {"prompt": "x", "max_tokens": 2})


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_a_key(script: Callable[..., Live]) -> None:
    server = script("Yes.", ServerOptions(api_key="secret"))
    assert server.error(CHAT, chat(), 401)["code"] == "invalid_api_key"
    assert server.error(CHAT, chat(), 401, authorization="Bearer wrong")["code"] == "invalid_api_key"
    assert server.error(CHAT, chat(), 401, authorization="Bearer \u00ff".encode().decode("latin-1"))["code"]
    assert server.post(CHAT, chat(), authorization="Bearer secret")["choices"]
    assert server.post(CHAT, chat(), authorization="bearer secret")["choices"]
    message = chat(model="tiny-qwen3", max_tokens=5)
    assert server.post("/v1/messages", message, **{"x-api-key": "secret"})["content"]
    assert server.error("/v1/messages", message, 401)["type"] == "authentication_error"
    assert server.request("GET", "/metrics")[0] == 401
    assert server.request("GET", "/")[0] == server.request("GET", "/health")[0] == 200


def test_other_hosts_and_origins(script: Callable[..., Live]) -> None:
    server = script("Yes.", ServerOptions(hosts=("localhost", "127.0.0.1", "::1"), cors=("https://friend.example",)))
    assert server.error(CHAT, chat(), 403, host="evil.example")["code"] == "unknown_host"
    assert server.post(CHAT, chat(), host=f"localhost:{server.port}")
    assert server.error(CHAT, chat(), 403, origin="https://evil.example")["code"] == "cross_origin"
    assert server.error(CHAT, chat(), 403, origin="null")["code"] == "cross_origin"
    assert server.post(CHAT, chat(), origin=server.url)
    status, headers, _ = server.request("POST", CHAT, chat(), {"origin": "https://friend.example"})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://friend.example")
    asked = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    status, headers, _ = server.request("OPTIONS", CHAT, None, asked)
    assert (status, "POST" in headers["access-control-allow-methods"]) == (204, True)


def test_large_requests_are_refused(script: Callable[..., Live]) -> None:
    server = script("Yes.", ServerOptions(max_body_bytes=1000))
    assert server.error(CHAT, chat("x" * 2000), 413)["code"] == "request_too_large"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:  # without saying how long it is
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert b"413" in raw.recv(1000).split(b"\r\n")[0]


def test_slow_requests_are_refused(script: Callable[..., Live]) -> None:
    server = script("Yes.", ServerOptions(body_seconds=0.2))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in raw.recv(1000).split(b"\r\n")[0]


def test_slow_templates_are_given_up(script: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    server = script("Yes.", ServerOptions(text_seconds=0.1))
    monkeypatch.setattr("quasar.server.service.render_chat", lambda *_, **__: time.sleep(0.5))
    assert "takes longer than" in server.error(CHAT, chat())["message"]


def test_a_full_queue(script: Callable[..., Live]) -> None:
    server = script("word " * 20, ServerOptions(max_queue=1), max_sequences=2, hold=4)
    streams = [server.events(CHAT, chat()) for _ in range(3)]
    for stream in streams:
        next(stream)
    status, headers, body = server.request("POST", CHAT, chat())
    assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    assert server.error(CHAT, chat(n=4))["param"] == "n"
    server.engine.release.set()
    assert all(gathered(list(stream))["finish_reason"] == "stop" for stream in streams)
    until(lambda: server.service.jobs.live == 0)
    assert server.post(CHAT, chat())["choices"]


def test_shutdown_lets_running_requests_finish(script: Callable[..., Live]) -> None:
    server = script("word " * 20, hold=4)
    running = server.events(CHAT, chat())
    next(running)
    server.signal()
    until(lambda: server.service.jobs.closing)
    status, headers, body = server.request("POST", CHAT, chat())
    assert (status, json.loads(body)["error"]["code"], "retry-after" in headers) == (503, "shutting_down", True)
    assert server.request("GET", "/health")[0] == 503
    server.engine.release.set()
    assert gathered(list(running))["content"] == "word " * 20
    server._thread.join(10)
    assert not server._thread.is_alive()


def test_the_openapi_document_names_every_field(live: Live) -> None:
    document = live.get("/openapi.json")
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "tools", "response_format", "logit_bias", "chat_template_kwargs"} <= set(fields)
    assert set(document["paths"]) >= {CHAT, TEXT, "/v1/responses", "/v1/messages", "/tokenize"}
