"""`quasar batch`: a file of requests in OpenAI's batch format, answered together, in order, resumable."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quasar.cli import flags
from quasar.drafting import check_draft
from quasar.engine.engine import Engine
from quasar.errors import QuasarError
from quasar.reading import parse_json, read_lines

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "batch",
        help="answer a file of requests (OpenAI's batch format)",
        description='Answers a JSONL file of {"custom_id", "method": "POST", "url", "body"} lines, as OpenAI\'s batch '
        "API takes them, many at a time. Responses come in the same order; a line that cannot be answered gets its "
        "error in its place. A run that was interrupted goes on where it stopped.",
    )
    parser.add_argument("file", metavar="FILE", help="requests, one a line")
    parser.add_argument("--output", required=True, metavar="FILE", help="responses, one a line")
    parser.add_argument(
        "--max-sequences", type=int, default=16, metavar="N", help="requests that run together (default: %(default)s)"
    )
    flags.add_draft_flag(parser)
    flags.add_draft_store_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_lossless_flag(parser)
    flags.add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    flags.require_positive(args, "max_sequences")
    check_draft(args.draft)
    requests = read_requests(Path(args.file))
    output = Path(args.output)
    if output.exists():
        raise QuasarError(f"--output {output}: is there already; name another file, or remove it")
    partial = output.with_name(output.name + ".partial")
    done = answered(partial, requests)
    model = flags.load_model(args, args.precision, args.lossless)
    try:
        from quasar.server.app import create_app
        from quasar.server.service import ServerOptions
    except ImportError as error:
        raise QuasarError(f"quasar batch needs the server's packages ({error.name}): pip install '.[serve]'") from None
    with (
        flags.draft_memory(args, model) as memory,
        Engine(model, args.max_sequences, lossless=args.lossless, draft_memory=memory) as engine,
        appending(partial) as file,
    ):
        app = create_app(model, engine, ServerOptions(draft=args.draft, max_queue=len(requests) + args.max_sequences))
        progress = tqdm(total=len(requests), initial=done, unit="request", disable=not sys.stderr.isatty())

        async def answer_all() -> None:
            async for line in answers(app, requests[done:], args.max_sequences):
                # Half a surrogate pair, which JSON can say, is written as JSON says it.
                file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                file.flush()
                progress.update()

        asyncio.run(answer_all())
        progress.close()
    partial.replace(output)
    failed = sum(json.loads(line)["error"] is not None for line in output.read_bytes().splitlines())
    print(f"{len(requests)} requests answered, {failed} of them with an error; {output}", file=sys.stderr)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that is no request becomes {"custom_id", "problem"}. QuasarError: no such file."""
    lines = read_lines(path)
    requests = [_request(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise QuasarError(
            f'{path}: is empty; it should hold {{"custom_id", "method", "url", "body"}} objects, one a line'
        )
    return requests


def _request(line: str, number: int) -> dict[str, Any]:
    try:
        fields = parse_json(line)
    except ValueError as error:
        return {"custom_id": f"line-{number}", "problem": f"line {number} is no JSON ({error})"}
    if not isinstance(fields, dict):
        return {"custom_id": f"line-{number}", "problem": f"line {number} should be an object"}
    fields["custom_id"] = str(fields.get("custom_id", f"line-{number}"))
    if fields.get("method", "POST") != "POST":
        fields["problem"] = f"method is {fields['method']!r}; it should be POST"
    elif fields.get("url") not in URLS:
        fields["problem"] = f"url is {fields.get('url')!r}; use one of {', '.join(URLS)}"
    elif not isinstance(fields.get("body"), dict):
        fields["problem"] = "body should be an object"
    elif fields["body"].get("stream"):
        fields["problem"] = "body.stream goes with a server; leave it out"
    return fields


def answered(partial: Path, requests: list[dict[str, Any]]) -> int:
    """How many requests an interrupted run has answered; cuts a line that it had not finished.

    Raises QuasarError where the partial output belongs to other requests.
    """
    if not partial.exists():
        return 0
    kept: list[bytes] = []
    for line in partial.read_bytes().splitlines(keepends=True):
        try:
            custom_id = json.loads(line)["custom_id"]
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        if len(kept) >= len(requests) or custom_id != requests[len(kept)]["custom_id"]:
            raise QuasarError(f"{partial}: holds answers to other requests; remove it, or name another --output")
        kept.append(line)
    partial.write_bytes(b"".join(kept))
    return len(kept)


@contextmanager
def appending(path: Path) -> Iterator[Any]:
    try:
        with path.open("ab") as file:
            yield file
    except OSError as error:
        raise QuasarError(f"{path}: cannot be written ({error.strerror})") from None


async def answers(app: Any, requests: list[dict[str, Any]], together: int) -> AsyncIterator[dict[str, Any]]:
    """One response a request, in order; `together` of them are under way."""
    running: list[asyncio.Task[dict[str, Any]]] = []
    waiting = iter(requests)
    for request in waiting:
        running.append(asyncio.create_task(_answer(app, request)))
        if len(running) == together:
            break
    while running:
        yield await running.pop(0)
        following = next(waiting, None)
        if following is not None:
            running.append(asyncio.create_task(_answer(app, following)))


async def _answer(app: Any, request: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"id": f"batch_req_{request['custom_id']}", "custom_id": request["custom_id"]}
    if "problem" in request:
        return line | {"response": None, "error": {"code": "invalid_request", "message": request["problem"]}}
    status, body = await post(app, request["url"], request["body"])
    answer = {"status_code": status, "request_id": body.get("id", ""), "body": body}
    error = None
    if status != 200:
        details = body.get("error", {})
        error = {"code": details.get("code") or details.get("type"), "message": details.get("message")}
    return line | {"response": answer, "error": error}


async def post(app: Any, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Asks an ASGI application: status and JSON of the answer."""
    status, answer = await ask(app, path, json.dumps(body).encode())
    return status, json.loads(answer)


async def ask(app: Any, path: str, content: bytes) -> tuple[int, bytes]:
    """Asks an ASGI application (asgi.readthedocs.io) without a network: status and content of the answer."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    sent = False
    status, parts = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:  # the client stays until it has its answer
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
