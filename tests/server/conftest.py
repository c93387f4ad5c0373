"""A server on a port of its own: behind it the real engine, or one that says what the test tells it to."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator

import pytest

if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client", "llguidance")):
    collect_ignore_glob = ["test_*.py"]
else:
    from helpers.serving import TEMPLATE, Live, ScriptedEngine

    from quasar import Engine, Model
    from quasar.models.tokenizer import Tokenizer
    from quasar.server.service import ServerOptions

    def with_tokenizer(model: Model, template: str, more: list[str]) -> Model:
        """The model with a template of its own and more tokens, which only scripted engines may say."""
        old, model = model.tokenizer, copy.copy(model)
        backend = copy.deepcopy(old.backend)
        backend.add_tokens(more)
        model.tokenizer = Tokenizer(backend, old.name_or_path, old.special, template)
        return model

    @pytest.fixture(scope="session")
    def chat_model(shipped: Callable[..., Model]) -> Model:
        """tiny-qwen3 with a template that knows tools and thinking."""
        return with_tokenizer(shipped("qwen3"), TEMPLATE, [])

    @pytest.fixture(scope="session")
    def thinking_model(shipped: Callable[..., Model]) -> Model:
        """The same with Qwen3's markers as tokens."""
        return with_tokenizer(shipped("qwen3"), TEMPLATE, ["<think>", "</think>"])

    @pytest.fixture(scope="session")
    def live(chat_model: Model) -> Iterator[Live]:
        """The real engine, n-gram drafts."""
        with Live(chat_model, Engine(chat_model, 8), ServerOptions(draft="ngram", max_queue=64)) as server:
            yield server

    @pytest.fixture
    def script(thinking_model: Model) -> Iterator[Callable[..., Live]]:
        """script(text, batch=3, ...): a server whose engine says that text, in passes of so many tokens."""
        servers: list[Live] = []

        def start(text: str | list[int], options: ServerOptions | None = None, **how: object) -> Live:
            engine = ScriptedEngine(thinking_model, text, **how)
            servers.append(Live(thinking_model, engine, options or ServerOptions()).__enter__())
            return servers[-1]

        yield start
        for server in servers:
            server.__exit__(None, None, None)
