"""HTTP's side: reading requests, streams of events, clients that go away, and who may ask at all."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quasar.server.errors import ApiError, from_validation

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
KEEP_ALIVE_SECONDS = 15.0
OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})  # without a key: the page asks for it itself

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody reads the response any more."""


class Json(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def error_response(error: ApiError, anthropic: bool = False) -> Response:
    body = error.anthropic() if anthropic else error.openai()
    return Json(body, status_code=error.status, headers=error.headers())


async def read_body(request: Request, model: type[M], most: int, seconds: float) -> M:
    """The request's JSON as a checked object. Raises ApiError for a body too large, too slow, or wrong."""
    raw = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            raw.extend(chunk)
            if len(raw) > most:
                raise ApiError(f"the request is larger than {most} bytes", status=413, code="request_too_large")

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise ApiError("the request did not arrive in time", status=408, code="request_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return model.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise ApiError("the request is nested too deeply", code="invalid_json") from None


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does the work unless the client goes away first: then it is cancelled, and ClientGone raised."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(BaseException):
                await each


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. When the client goes away, the events' iterator is closed at once."""

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[bool], None], anthropic: bool = False) -> None:
        """on_end(gone): called once when the stream is over; gone: the client left before."""
        self._events = events
        self._on_end = on_end
        self._anthropic = anthropic
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(_gone(receive))
        gone = True
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            gone = not (pump.done() and pump.result())
        finally:
            self._on_end(gone)
            for each in (pump, watch):
                each.cancel()
                with contextlib.suppress(BaseException):
                    await each

    async def _pump(self, send: Send) -> bool:
        """Sends the events; whether the client was there to the end."""

        async def say(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        news: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                news = news or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({news}, timeout=KEEP_ALIVE_SECONDS)
                if not done:
                    await say(b": waiting\n\n")
                    continue
                try:
                    event = news.result()
                except StopAsyncIteration:
                    break
                news = None
                await say(event)
        except ApiError as error:
            await say(self._error(error))
        except OSError:
            return False
        except Exception:
            log.exception("a stream failed")
            await say(self._error(ApiError("the server failed; its log says why", status=500)))
        finally:
            if news is not None:  # also one that ended in the moment in which the client left
                news.cancel()
                with contextlib.suppress(BaseException):
                    await news
            await self._events.aclose()  # type: ignore[attr-defined]
        await say(b"", more=False)
        return True

    def _error(self, error: ApiError) -> bytes:
        return event_bytes(error.anthropic(), "error") if self._anthropic else event_bytes(error.openai())


def event_bytes(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(data, inf_nan_mode="null") + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Gate:
    """Before every endpoint: Host and Origin, the key, the announced size; CORS headers after it."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        cors: tuple[str, ...],
        max_body_bytes: int,
        hosts: tuple[str, ...] | None,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self._cors = cors
        self._most = max_body_bytes
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, origin = scope["path"], headers.get("origin")
        shared = self._cors_headers(origin)
        try:
            self._check_host(headers, path)
            self._check_origin(origin, headers, shared)
            if scope["method"] == "OPTIONS" and origin is not None and "access-control-request-method" in headers:
                response = Response(status_code=204, headers={**shared, **self._preflight(headers)})
                await response(scope, receive, send)
                return
            self._check_key(path, headers)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self._most:
                raise ApiError(f"the request is larger than {self._most} bytes", status=413, code="request_too_large")
        except ApiError as error:
            response = error_response(error, path.startswith("/v1/messages"))
            response.headers.update(shared)
            if error.status == 413:
                response.headers["connection"] = "close"
            await response(scope, receive, send)
            return

        async def send_shared(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in shared.items()]
                message = {**message, "headers": [*message["headers"], *extra, (b"x-content-type-options", b"nosniff")]}
            await send(message)

        await self._app(scope, receive, send_shared)

    def _check_host(self, headers: Mapping[str, str], path: str) -> None:
        """A page elsewhere may point a name of its own at this machine; its requests carry that name."""
        if self._hosts is None or path == "/health":
            return
        host = headers.get("host", "")
        with contextlib.suppress(ValueError):
            host = urlsplit(f"//{host}").hostname or ""
        if host.lower() not in self._hosts:
            raise ApiError(f"the host '{host[:80]}' is not served here", status=403, code="unknown_host")

    def _check_origin(self, origin: str | None, headers: Mapping[str, str], shared: Mapping[str, str]) -> None:
        """Other sites' pages may ask only where --cors names them."""
        if origin is None or shared or self._key is not None:
            return
        own = urlsplit(origin).netloc if origin != "null" else None
        if own != headers.get("host"):
            raise ApiError(f"pages of {origin[:80]} may not ask; see --cors", status=403, code="cross_origin")

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Digests are of one length, so that the comparison takes the same time for every key.
        digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
        if not hmac.compare_digest(digest, self._key):
            raise ApiError(
                "the API key is missing or wrong", status=401, code="invalid_api_key", kind="authentication_error"
            )

    def _cors_headers(self, origin: str | None) -> dict[str, str]:
        if origin is None or not ("*" in self._cors or origin in self._cors):
            return {}
        return {
            "access-control-allow-origin": "*" if "*" in self._cors else origin,
            "access-control-expose-headers": "retry-after",
            "vary": "origin",
        }

    def _preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "access-control-max-age": "600",
        }


def content_security_policy(script: str, style: str) -> str:
    """Only the page's own script and style, and requests to its own server."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
