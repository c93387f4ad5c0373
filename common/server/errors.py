"""What goes wrong with a request, in the shapes that clients of OpenAI and Anthropic read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than 200. `param` is the request's parameter that is to blame."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.retry_after = retry_after

    def openai(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Anthropic's; it has no field for the parameter, so the message names it."""
        message = self.message if not self.param or self.param in self.message else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(self.status, "api_error"), "message": message}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that pydantic found wrong, by the name that the client gave it."""
    first = _most_telling(error.errors(include_url=False, include_context=False, include_input=False))
    param = _path(first["loc"]) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the request body is not JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(f"unknown parameter: '{param}'", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"'{param}': {message}" if param else message, param=param, code="invalid_value")


def _most_telling(errors: Sequence[Any]) -> Any:
    """Of a union's errors the one deepest inside, rather not of a type: the client meant that alternative."""
    top = errors[0]["loc"][:1]
    return max(
        (e for e in errors if e["loc"][:1] == top), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type"))
    )


def _path(loc: Sequence[str | int]) -> str:
    """`messages[0].content`: without the names that pydantic gives a union's alternatives."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool", "list", "dict"):
            text += f".{part}" if text else part
    return text
