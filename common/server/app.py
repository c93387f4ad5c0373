"""The routes of the server, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quasar.models.model import Model
from quasar.server import chat, completions, messages, protocol, responses
from quasar.server.errors import ApiError
from quasar.server.http import (
    ClientGone,
    EventStream,
    Gate,
    Json,
    content_security_policy,
    error_response,
    read_body,
    until_gone,
)
from quasar.server.jobs import EngineLike
from quasar.server.metrics import CONTENT_TYPE
from quasar.server.openapi import document
from quasar.server.service import ServerOptions, Service

PAGE = Path(__file__).with_name("page.html")

log = logging.getLogger(__name__)


def create_app(model: Model, engine: EngineLike, options: ServerOptions | None = None) -> Starlette:
    """The server as an ASGI application. `app.state.service` is what its endpoints share.

    The caller shuts the engine down; `close(app)` before that ends what runs.
    """
    options = options or ServerOptions()
    service = Service(model, engine, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.jobs.closing = True
        service.jobs.cancel_all()
        service.close()

    app = Starlette(routes=_routes(service), lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    app.state.service = service
    app.add_middleware(
        Gate,
        api_key=options.api_key,
        cors=options.cors,
        max_body_bytes=options.max_body_bytes,
        hosts=options.hosts,
    )
    return app


async def drain(app: Starlette, seconds: float) -> bool:
    """Takes no more requests, and waits for those that run; whether they ended in time. The rest is cancelled."""
    jobs = app.state.service.jobs
    jobs.closing = True
    until = time.monotonic() + seconds
    while jobs.live and time.monotonic() < until:
        await asyncio.sleep(0.05)
    in_time = not jobs.live
    jobs.cancel_all()
    return in_time


def _routes(service: Service) -> list[Route]:
    generating = [
        ("/v1/chat/completions", protocol.ChatRequest, chat.prepare, chat.ChatResponse),
        ("/v1/completions", protocol.CompletionRequest, completions.prepare, completions.CompletionResponse),
        ("/v1/responses", protocol.ResponsesRequest, responses.prepare, responses.ResponsesResponse),
        ("/v1/messages", protocol.MessagesRequest, messages.prepare, messages.MessagesResponse),
    ]
    routes = [Route(path, _generating(service, *rest), methods=["POST"]) for path, *rest in generating]

    async def models(_: Request) -> Response:
        return Json({"object": "list", "data": [_card(service)]})

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return Json(_card(service))

    async def tokenize(body: protocol.TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if body.messages is not None:
            options = {"add_generation_prompt": body.add_generation_prompt}
            ids = await service.render(body.messages, body.tools or (), body.chat_template_kwargs, **options)
        else:
            ids = await service.encode(body.prompt or "", body.add_special_tokens)
        strings = [service.texts.text_of(i) for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings}

    async def detokenize(body: protocol.DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if body.tokens:
            service.check_ids(body.tokens, "tokens")
        return {"prompt": await service.apart(lambda: service.decode(body.tokens), "tokens")}

    async def count_tokens(body: protocol.CountTokensRequest) -> dict[str, Any]:
        return {"input_tokens": len(await messages.prompt_of(service, body))}

    async def health(_: Request) -> Response:
        closing = service.jobs.closing
        return Json({"status": "shutting down" if closing else "ok"}, status_code=503 if closing else 200)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(_: Request) -> Response:
        return Json(document())

    page, policy = _page()

    async def index(_: Request) -> Response:
        headers = {
            "content-security-policy": policy,
            "content-type": "text/html; charset=utf-8",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(page, headers=headers)

    async def no_icon(_: Request) -> Response:
        return Response(status_code=204)

    return [
        *routes,
        Route(
            "/v1/messages/count_tokens",
            _answering(service, protocol.CountTokensRequest, count_tokens),
            methods=["POST"],
        ),
        Route("/v1/models", _guarded(models)),
        Route("/v1/models/{name:path}", _guarded(one_model)),
        Route("/tokenize", _answering(service, protocol.TokenizeRequest, tokenize), methods=["POST"]),
        Route("/detokenize", _answering(service, protocol.DetokenizeRequest, detokenize), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/favicon.ico", no_icon),
        Route("/", index),
    ]


def _card(service: Service) -> dict[str, Any]:
    """A model object; what the page reads stands beside OpenAI's fields."""
    tokenizer = service.model.tokenizer
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "quasar",
        "max_model_len": service.context,
        "precision": service.model.precision,
        "chat": bool(tokenizer is not None and tokenizer.chat_template),
        "thinks": service.markers is not None,
        "draft": service.options.draft,
    }


def _generating(
    service: Service,
    model: type[BaseModel],
    prepare: Callable[[Service, Any], Awaitable[Any]],
    response: type[Any],
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that generates: checks, starts, and answers whole or as a stream."""

    async def endpoint(request: Request) -> Response:
        options = service.options
        body = await read_body(request, model, options.max_body_bytes, options.body_seconds)
        started = await until_gone(request, _started(prepare(service, body), body))
        answer = response(service, body, started)
        if getattr(body, "stream", None):

            def ended(gone: bool) -> None:
                started.cancel()
                if gone:
                    service.metrics.gone.inc()

            return EventStream(answer.chunks(), ended, model is protocol.MessagesRequest)
        try:
            return Json(await until_gone(request, answer.whole()))
        finally:
            started.cancel()

    return _guarded(endpoint, model is protocol.MessagesRequest, service)


async def _started(preparing: Awaitable[Any], body: Any) -> Any:
    request = await preparing
    if isinstance(body, protocol.CompletionRequest) and not body.stream:
        return request  # it may have a prompt to score first, and starts itself
    return request.start()


def _answering(
    service: Service, model: type[BaseModel], work: Callable[[Any], Awaitable[Any]]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers at once."""

    async def endpoint(request: Request) -> Response:
        options = service.options
        body = await read_body(request, model, options.max_body_bytes, options.body_seconds)
        return Json(await work(body))

    return _guarded(endpoint, model is protocol.CountTokensRequest)


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]], anthropic: bool = False, service: Service | None = None
) -> Callable[[Request], Awaitable[Response]]:
    """Errors in the client's shape, none as a traceback to the client."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            return error_response(error, anthropic)
        except ClientGone:
            if service is not None:
                service.metrics.gone.inc()
            return Response(status_code=499)
        except Exception:
            log.exception("%s failed", request.url.path)
            return error_response(ApiError("the server failed; its log says why", status=500), anthropic)

    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not answered here"}
    wrong = ApiError(message.get(error.status_code, error.detail), status=error.status_code)
    response = error_response(wrong, request.url.path.startswith("/v1/messages"))
    response.headers.update(error.headers or {})
    return response


def _page() -> tuple[str, str]:
    """The page and the policy that lets only its own script and style run."""
    text = PAGE.read_text(encoding="utf-8")
    script = text.split("<script>", 1)[1].split("</script>", 1)[0]
    style = text.split("<style>", 1)[1].split("</style>", 1)[0]
    return text, content_security_policy(script, style)
