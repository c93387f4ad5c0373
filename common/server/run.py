"""Runs the server: sockets, signals, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import uvicorn

from quasar.engine.settings import GenerationSettings
from quasar.errors import QuasarError
from quasar.models.model import Model
from quasar.server.app import create_app, drain
from quasar.server.jobs import EngineLike
from quasar.server.service import ServerOptions

__all__ = ["ServerOptions", "listen", "serve", "warm_up"]

# Python's threads hand the interpreter over this often. The engine's thread waits for it after every pass, and the
# default of 5 ms is as long as a pass of a small model takes.
SWITCH_SECONDS = 0.0005


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A listening socket; QuasarError where the address is not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise QuasarError(f"--host {host}: no such address ({error.strerror or error})") from None
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(2048)
        except OSError as error:
            reason = error.strerror or str(error)
            raise QuasarError(f"--port {port}: cannot listen on {host} ({reason}); name another port") from None
        yield [listening]


def warm_up(engine: Any, options: ServerOptions) -> None:
    """The first pass packs weights and measures costs, which no client should wait for.

    Raises QuasarError for drafts that this model cannot have.
    """
    lossless = getattr(engine, "lossless", False)
    settings = GenerationSettings(max_new_tokens=4, ignore_eos=True, lossless=lossless, draft=options.draft)
    engine.submit([1, 2, 3, 1, 2, 3], settings).result()


class Server(uvicorn.Server):
    """The first signal lets running requests finish, and refuses new ones with 503; the second ends at once."""

    def __init__(self, config: uvicorn.Config, seconds: float) -> None:
        super().__init__(config)
        self._seconds = seconds
        self._draining: asyncio.Task[bool] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._loop is None:
            self.should_exit = True
        elif self._draining is None:
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(drain(self.config.app, self._seconds))
        self._draining.add_done_callback(lambda _: setattr(self, "should_exit", True))


def make_server(app: Any, seconds: float) -> Server:
    """uvicorn around the application. It takes no headers from proxies, and says nothing about itself."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        http="h11",  # which bounds the request line and the headers; httptools does not
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return Server(config, seconds)


def serve(
    model: Model,
    engine: EngineLike,
    options: ServerOptions,
    sockets: list[socket.socket],
    seconds: float = 30.0,
    out: TextIO | None = None,
) -> None:
    """Serves until a signal; running requests then have `seconds` to finish. Shuts the engine down."""
    app = create_app(model, engine, options)
    server = make_server(app, seconds)
    sys.setswitchinterval(SWITCH_SECONDS)
    host, port = sockets[0].getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    name = app.state.service.name
    print(f"{name} at {where}/v1, a page at {where}/ (Ctrl-C ends it)", file=out, flush=True)
    if options.api_key is None and options.hosts is None:
        print("warning: no API key: whoever reaches this address may use the model", file=out, flush=True)
    try:
        server.run(sockets)
    finally:
        engine.shutdown()
