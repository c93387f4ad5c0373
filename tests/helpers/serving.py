"""What tests of the server share: a server in a thread, a plain HTTP client, an engine that follows a script."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from quasar import GenerationSettings, Model
from quasar.engine.engine import EngineStats
from quasar.engine.settings import Result, TokenEvent
from quasar.errors import QuasarError
from quasar.server.app import create_app
from quasar.server.run import make_server
from quasar.server.service import ServerOptions
from quasar.text import TextStream

# After Qwen3's: tools in the system turn, <think> closed at once where thinking is off.
TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\n' }}"
    '{%- endfor %}{{- \'<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n\' }}{%- endif %}'
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


class Live:
    """A server in a thread. `get` and `post` speak to it; `stream` reads its events."""

    def __init__(self, model: Model, engine: Any, options: ServerOptions) -> None:
        self.app = create_app(model, engine, options)
        self.engine, self.model = engine, model
        self.service = self.app.state.service
        self._server = make_server(self.app, 5.0)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> Live:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self.engine.shutdown()
        self._thread.join(20)
        self._socket.close()

    def signal(self) -> None:
        """What Ctrl-C does."""
        self._server.handle_exit(2, None)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body. A body that is no bytes goes as JSON."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, raw, {"content-type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Any:
        status, _, body = self.request("GET", path, None, headers)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        status, _, answer = self.request("POST", path, body, headers)
        assert status == 200, answer
        return json.loads(answer)

    def error(self, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
        """The error object of a request that must fail so."""
        got, _, answer = self.request("POST", path, body, headers)
        assert got == status, (got, answer)
        return json.loads(answer)["error"]

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """All events of a stream, parsed; [DONE] must be the last of OpenAI's, and is left out."""
        return list(self.events(path, body))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
        finally:
            connection.close()


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"messages": [{"role": "user", "content": text}], **more}


def gathered(chunks: Sequence[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """One choice's message and finish reason, put together from a chat's chunks as clients do."""
    out: dict[str, Any] = {
        "content": "",
        "reasoning_content": "",
        "tool_calls": [],
        "logprobs": [],
        "finish_reason": None,
    }
    for chunk in chunks:
        for choice in (c for c in chunk["choices"] if c["index"] == index):
            delta = choice["delta"]
            out["content"] += delta.get("content") or ""
            out["reasoning_content"] += delta.get("reasoning_content") or ""
            assert delta.get("reasoning_content") == delta.get("reasoning")
            for call in delta.get("tool_calls") or ():
                if "id" in call:
                    assert call["index"] == len(out["tool_calls"])
                    out["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                out["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            if choice.get("logprobs"):
                out["logprobs"] += choice["logprobs"]["content"]
            if choice["finish_reason"]:
                assert out["finish_reason"] is None
                out["finish_reason"] = choice["finish_reason"]
    return out


def until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class ScriptedEngine:
    """Says one text to everyone, `batch` tokens a pass, all but the first of a pass as drafted. It has no model.

    hold: waits before the token of that number until `release` is set. pause: seconds between passes.
    """

    def __init__(
        self,
        model: Model,
        text: str | list[int],
        batch: int = 3,
        max_sequences: int = 4,
        pause: float = 0.0,
        hold: int | None = None,
        end: bool = True,
    ) -> None:
        self.model, self.max_sequences = model, max_sequences
        ids = model.tokenizer.encode(text) if isinstance(text, str) else list(text)
        self.ids = ids + [min(model.stop_ids)] * end
        self.batch, self.pause, self.hold = batch, pause, hold
        self.release = threading.Event()
        self.handles: list[ScriptedHandle] = []
        self.closed = False

    def submit(self, prompt: Sequence[int], settings: GenerationSettings, *, on_events: Any) -> ScriptedHandle:
        if self.closed:
            raise QuasarError("the engine is shutting down")
        self.handles.append(ScriptedHandle(self, list(prompt), settings, on_events))
        return self.handles[-1]

    def stats(self) -> EngineStats:
        return EngineStats(running=sum(not handle.over for handle in self.handles))

    def shutdown(self, wait_seconds: float = 0.0) -> None:
        self.closed = True
        self.release.set()
        for handle in self.handles:
            handle.cancel()
            handle.thread.join()


class ScriptedHandle:
    def __init__(self, engine: ScriptedEngine, prompt: list[int], settings: GenerationSettings, on_events: Any) -> None:
        self.engine, self.prompt, self.settings, self._hear = engine, prompt, settings, on_events
        self.cancelled = self.over = False
        self.passes_done = 0
        self._end = threading.Event()
        self._result = Result(prompt_tokens=len(prompt))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> Result:
        self._end.wait()
        return self._result

    def _run(self) -> None:
        engine, result = self.engine, self._result
        stream = TextStream(engine.model.decode, self.settings.stop)
        ids = engine.ids[: self.settings.max_new_tokens]
        result.stats.weight_bytes_per_pass = 5_000_000
        begin = time.perf_counter()
        done = 0
        while done < len(ids) and not self.cancelled and not stream.stopped:
            if engine.hold is not None and done >= engine.hold:
                while not engine.release.wait(0.01) and not self.cancelled:
                    pass
                if self.cancelled:
                    break
            time.sleep(engine.pause)
            events = []
            for i, token in enumerate(ids[done : done + (engine.batch if done else 1)]):
                done += 1
                result.token_ids.append(token)
                scored = self.settings.logprobs is not None
                best = [(token, -0.5), (7, -1.5)][: self.settings.logprobs] if scored else None
                events.append(TokenEvent(token, stream.push(token), i > 0, -0.5 if scored else None, best))
                if token in engine.model.stop_ids or stream.stopped:
                    result.finish_reason = "stop"
                    result.stop_reason = stream.stop_string if stream.stopped else token
                    break
            result.stats.tokens = len(result.token_ids)
            if done > 1:
                result.stats.seconds_decode = time.perf_counter() - begin
                result.accept_lengths.append(len(events))
                result.stats.passes += 1
                result.stats.drafted += len(events)
                result.stats.accepted += len(events) - 1
            self._hear(events)
            self.passes_done += 1
        rest = stream.finish()
        if rest:
            self._hear([TokenEvent(None, rest)])
        result.text = stream.text
        if self.cancelled:
            result.finish_reason = "cancelled"
        self.over = True
        self._end.set()
        self._hear(None)
