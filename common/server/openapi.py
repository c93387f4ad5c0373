"""The OpenAPI document, made of the same classes that check requests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic.json_schema import models_json_schema

from quasar.server import protocol

_POSTS = {
    "/v1/chat/completions": (protocol.ChatRequest, "A chat's next message.", True),
    "/v1/completions": (protocol.CompletionRequest, "A text's continuation.", True),
    "/v1/responses": (protocol.ResponsesRequest, "A response, in OpenAI's newer shape.", True),
    "/v1/messages": (protocol.MessagesRequest, "A message, in Anthropic's shape.", True),
    "/v1/messages/count_tokens": (protocol.CountTokensRequest, "The length of a conversation in tokens.", False),
    "/tokenize": (protocol.TokenizeRequest, "Token ids of a text or a conversation.", False),
    "/detokenize": (protocol.DetokenizeRequest, "The text of token ids.", False),
}
_GETS = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the server takes requests.",
    "/metrics": "Prometheus metrics.",
}
_OTHERS = {
    "400": "The request is wrong; the error names the parameter.",
    "401": "The API key is missing or wrong.",
    "403": "This host or origin may not ask.",
    "404": "No such model.",
    "413": "The request is too large.",
    "429": "The queue is full; Retry-After says when to come back.",
    "503": "The server is shutting down.",
}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    models = [model for model, _, _ in _POSTS.values()]
    places, schemas = models_json_schema(
        [(m, "validation") for m in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    error = {"content": {"application/json": {"schema": {"type": "object"}}}}
    for path, (model, summary, streams) in _POSTS.items():
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": places[model, "validation"]}},
                },
                "responses": {
                    "200": {"description": "The answer.", "content": content},
                    **{code: {"description": text, **error} for code, text in _OTHERS.items()},
                },
            }
        }
    for path, summary in _GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        codes = {
            code: {"description": text, **error} for code, text in _OTHERS.items() if code in ("401", "403", "503")
        }
        paths[path] = {
            "get": {
                "summary": summary,
                "responses": {"200": {"description": "The answer.", "content": {kind: {}}}, **codes},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quasar",
            "version": "1",
            "description": "A model behind OpenAI's and Anthropic's interfaces.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
