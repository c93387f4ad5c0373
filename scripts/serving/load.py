"""Clients from outside, over HTTP, for any OpenAI-compatible server. Needs nothing but Python.

    python scripts/serving/load.py figures URL [--prompts FILE] [--clients 1,4,16] [--requests 32] [--max-tokens 64]
    python scripts/serving/load.py soak URL [--requests 1000] [--seconds 0] [--pid PID]

`figures` measures requests/s, tokens/s, time to first token and between tokens. `soak` mixes greedy and sampled,
streamed and whole requests, a tenth of them abandoned and a tenth of them garbage, from 16 clients, and compares each
text with the one that the same request gets alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

FORMS = [
    "What is {}? Answer a child.",
    "Write a short poem about {}.",
    "Why do people study {}? Give three reasons.",
    "Write a letter to a friend in which you tell how you learnt about {}.",
    "Plan a lesson of one hour about {} for a class of ten-year-olds.",
    "Name two common mistakes that people make about {}, and correct them.",
    "Tell a story of one paragraph in which {} matters.",
    "Compare {} with cooking, in five sentences.",
    "Write a Python dictionary with four facts about {}.",
    "Somebody says that {} is boring. Answer politely.",
]
SUBJECTS = [
    "gravity", "the sea", "electricity", "bread", "bridges", "sleep", "chess", "the moon", "volcanoes", "money",
    "bees", "maps",
]  # fmt: skip
QUESTIONS = [form.format(SUBJECTS[(i + j) % 12]) for j in range(12) for i, form in enumerate(FORMS)]  # none twice
TOPICS = ["stack", "queue", "parser", "cache", "matrix", "date", "file", "socket", "tree", "graph", "counter", "lock"]


class Client:
    """One connection, kept open."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        self._at = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: Any) -> http.client.HTTPResponse:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        for again in (True, False):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*self._at, timeout=600)
            try:
                self._connection.request("POST", path, raw, self._headers)
                return self._connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError):
                self.close()
                if not again:
                    raise
        raise AssertionError

    def abandon(self) -> None:
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def served(url: str, key: str | None) -> str:
    """The model's name."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"} if key else {})
    name = json.load(connection.getresponse())["data"][0]["id"]
    connection.close()
    return name


def prompt(dice: random.Random) -> str:
    """Code to continue: some of it repeats, as code does."""
    a, b = dice.sample(TOPICS, 2)
    return (
        f"import {a}\n\n\ndef open_{a}(path):\n    with open(path) as {a}:\n        return {a}.read()\n\n\n"
        f"def open_{b}(path):\n    with open(path)"
    )


# --- figures --------------------------------------------------------------------------------------------------------


def measure(
    url: str, key: str | None, questions: list[str], clients: int, tokens: int, temperature: float
) -> dict[str, float]:
    """Streams answers to so many clients at once; seconds as a client sees them."""
    model = served(url, key)
    first: list[float] = []
    between: list[float] = []
    counted: list[int] = []
    lock = threading.Lock()

    def work(numbers: range) -> None:
        client = Client(url, key)
        for number in numbers:
            messages = [{"role": "user", "content": questions[number]}]
            length = tokens // 2 + number * 7 % (tokens + 1)  # answers end when others do not, as people's do
            wish = {"model": model, "messages": messages, "max_tokens": length, "stream": True}
            wish |= {"temperature": temperature, "seed": number, "stream_options": {"include_usage": True}}
            wish |= {"ignore_eos": True}
            begin = time.perf_counter()
            answer = client.post("/v1/chat/completions", wish)
            if answer.status != 200:
                raise SystemExit(f"{url}: {answer.status} {answer.read()[:300]!r}")
            times: list[float] = []
            used = 0
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()):
                    times.append(time.perf_counter())
                used = (chunk.get("usage") or {}).get("completion_tokens", used)
            with lock:
                counted.append(used)
                if times:
                    first.append(times[0] - begin)
                if len(times) > 1:  # several tokens may share a chunk: the mean of each answer counts
                    between.append((times[-1] - times[0]) / max(1, used - 1))
        client.close()

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, [range(i, len(questions), clients) for i in range(clients)]))
    seconds = time.perf_counter() - begin
    return {
        "clients": clients,
        "requests_per_second": len(questions) / seconds,
        "tokens_per_second": sum(counted) / seconds,
        "first_token_p50_ms": 1e3 * median(first),
        "first_token_p99_ms": 1e3 * _high(first),
        "between_tokens_p50_ms": 1e3 * median(between),
        "between_tokens_p99_ms": 1e3 * _high(between),
    }


def _high(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def figures(args: argparse.Namespace) -> None:
    questions = QUESTIONS
    if args.prompts:
        lines = [json.loads(line) for line in Path(args.prompts).read_text().splitlines() if line.strip()]
        questions = [line["turns"][0] if "turns" in line else line["prompt"] for line in lines]
    each = [int(n) for n in args.clients.split(",")]
    needed, count = len(each) * args.requests + 4, args.requests
    if needed > len(questions):  # none comes twice: an answer that was given before would be drafted whole
        raise SystemExit(f"--requests {count}: {needed} questions are needed; there are {len(questions)}")
    # What the first requests pay for is not the server's speed.
    measure(args.url, args.key, questions[-4:], 2, 8, args.temperature)
    rows = []
    for i, n in enumerate(each):
        some = questions[i * count : (i + 1) * count]
        rows.append(measure(args.url, args.key, some, n, args.max_tokens, args.temperature))
    names = list(rows[0])
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|" + " ---: |" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row[name]:.4g}" for name in names) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


# --- soak -----------------------------------------------------------------------------------------------------------


def wishes(count: int, model: str) -> list[dict[str, Any]]:
    """Requests, half of them greedy."""
    dice = random.Random(7)
    out = []
    for _ in range(count):
        wish: dict[str, Any] = {"model": model, "prompt": prompt(dice), "max_tokens": dice.randint(1, 40)}
        wish |= dice.choice(
            [{"temperature": 0}, {"temperature": dice.choice([0.3, 0.8, 1.3]), "seed": dice.randrange(9)}]
        )
        wish |= dice.choice([{}, {}, {"top_p": 0.9}, {"top_k": 30}, {"presence_penalty": 0.5}, {"logprobs": 1}])
        wish |= dice.choice([{}, {}, {}, {"stop": ["\n\n"]}, {"response_format": {"type": "json_object"}}])
        out.append(wish | {"return_token_ids": True})
    return out


def ids_of(client: Client, wish: dict[str, Any], stream: bool) -> list[int]:
    """The output's token ids, waiting where the queue is full."""
    while True:
        answer = client.post("/v1/completions", wish | {"stream": stream})
        if answer.status != 429:
            break
        answer.read()
        time.sleep(float(answer.headers["retry-after"]) / 10)
    if answer.status != 200:
        raise AssertionError((answer.status, answer.read()))
    if not stream:
        return json.loads(answer.read())["choices"][0]["token_ids"]
    chunks = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids", [])]


def soak(args: argparse.Namespace) -> None:
    model = served(args.url, args.key)
    todo = wishes(args.requests, model)
    garbage = [
        b"",
        b"{",
        b"[[[",
        b"\xff\xfe\x00",
        b'{"prompt": 5}',
        b'{"prompt": "x", "top_p": 9}',
        b'{"prompt": [1e9]}',
    ]
    results: dict[int, list[int]] = {}
    counts = {"compared": 0, "abandoned": 0, "garbage": 0, "wrong": 0, "lost": 0, "garbage answered 5xx": 0}
    lock = threading.Lock()
    memory: list[float] = []
    clients = threading.local()

    def one(number: int) -> None:
        wish = todo[number % len(todo)]
        if not hasattr(clients, "own"):
            clients.own = Client(args.url, args.key)
        client, dice = clients.own, random.Random(number)
        try:
            if number % 10 == 3:
                client.post("/v1/completions", wish | {"max_tokens": 500, "stream": True}).read(dice.randint(1, 400))
                client.abandon()
                with lock:
                    counts["abandoned"] += 1
            elif number % 10 == 7:
                answer = client.post("/v1/completions", dice.choice(garbage))
                answer.read()
                with lock:
                    counts["garbage"] += 1
                    counts["garbage answered 5xx"] += answer.status >= 500
            else:
                ids = ids_of(client, wish, bool(dice.randrange(2)))
                with lock:
                    counts["wrong"] += results.setdefault(number % len(todo), ids) != ids
                    counts["compared"] += 1
        except (OSError, http.client.HTTPException, AssertionError, KeyError) as error:
            client.close()
            with lock:
                counts["lost"] += 1
            print(f"request {number}: {error!r}", file=sys.stderr)

    threads_before = int(_status(args.pid, "Threads")) if args.pid else 0
    begin, done = time.monotonic(), 0
    with ThreadPoolExecutor(16) as pool:
        while done < args.requests or time.monotonic() - begin < args.seconds:
            list(pool.map(one, range(done, done + 100)))
            done += 100
            if args.pid:
                memory.append(_status(args.pid, "VmRSS") / 1024)
    seconds = time.monotonic() - begin
    alone = Client(args.url, args.key)
    for number, ids in results.items():
        counts["wrong"] += ids_of(alone, todo[number], False) != ids
    alone.close()
    print(f"{done} requests in {seconds:.0f} s: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    left = _left(args.url, args.key)
    print(f"sequences left in the server: {left:.0f}")
    grown = 1.0
    if memory:
        third = len(memory) // 3
        grown = median(memory[-third - 1 :]) / median(memory[third : 2 * third + 1])
        print("resident memory, MB after each 100 requests: " + " ".join(f"{m:.0f}" for m in memory))
        threads = int(_status(args.pid, "Threads"))
        print(f"its last third is {grown:.3f} of the one before; threads: {threads_before} before, {threads} after")
    if counts["wrong"] or counts["lost"] or counts["garbage answered 5xx"] or left or grown > 1.05:
        raise SystemExit(1)


def _left(url: str, key: str | None) -> float:
    """Sequences that run or wait, by the server's own metrics, a second after the last answer."""
    time.sleep(1)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("GET", "/metrics", headers={"authorization": f"Bearer {key}"} if key else {})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    kept = [line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))]
    return sum(float(line.split()[-1]) for line in kept)


def _status(pid: int, name: str) -> float:
    """A number of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, run in (("figures", figures), ("soak", soak)):
        each = kinds.add_parser(name)
        each.add_argument("url")
        each.add_argument("--key")
        each.add_argument("--requests", type=int, default=32 if run is figures else 1000)
        each.set_defaults(run=run)
        if run is figures:
            each.add_argument("--prompts", help="JSONL with prompt or turns (default: built-in questions)")
            each.add_argument("--clients", default="1,4,16")
            each.add_argument("--max-tokens", type=int, default=64)
            each.add_argument("--temperature", type=float, default=0.0)
            each.add_argument("--json")
        else:
            each.add_argument("--seconds", type=float, default=0.0)
            each.add_argument("--pid", type=int)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
