"""Every error that a caller or a metric can see, and the only place that knows how an error body looks.

`GatewayError` is what a caller gets: a status, a sentence, a stable code. `UpstreamFailure` is what went
wrong with an engine: a reason from a closed list (it is a metric label) and whether a retry is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NAMES_SHOWN = 20
_ENGINE_MESSAGE_LIMIT = 2000
_ROUTE_NOT_FOUND = "Not Found"  # of the web framework: /v1/embeddings of a model that chats, say


class GatewayError(Exception):
    """What the caller gets instead of an answer.

    `code` is stable and documented, `message` is for a person, `retry_after` is in whole seconds, `allow` is
    the header of a 405.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    @property
    def type(self) -> str:
        """The error's class in OpenAI's words: https://platform.openai.com/docs/guides/error-codes."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPE_OF_STATUS.get(self.status, default)


def bad_request(message: str, param: str | None = None, code: str = "invalid_request") -> GatewayError:
    return GatewayError(400, code, message, param=param)


def model_not_found(name: str, served: Iterable[str]) -> GatewayError:
    names = sorted(served)
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    what = f"Models served here: {shown}." if names else "No model is served here."
    return GatewayError(404, "model_not_found", f"The model {name!r} does not exist. {what}", param="model")


def model_removed(name: str) -> GatewayError:
    """While a request waited for it."""
    return GatewayError(404, "model_not_found", f"The model {name!r} has been removed.", param="model")


def model_not_allowed(name: str, allowed: Iterable[str]) -> GatewayError:
    names = sorted(allowed)
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    what = f"It may use: {shown}." if names else "It may use no model that is served here."
    return GatewayError(
        403, "model_not_allowed", f"This API key may not use the model {name!r}. {what}", param="model"
    )


def model_not_ready(name: str, reason: str, message: str, retry_after: int = 5) -> GatewayError:
    """A model that exists but has no endpoint: `reason` and `message` are those of its Ready condition."""
    why = ": ".join(part for part in (reason, message) if part) or "no endpoint is ready"
    text = f"The model {name!r} is not ready: {why}"
    return GatewayError(503, "model_not_ready", text, param="model", retry_after=retry_after)


def shutting_down() -> GatewayError:
    return GatewayError(503, "shutting_down", "The gateway is shutting down; try again.", retry_after=1)


def internal_error() -> GatewayError:
    return GatewayError(500, "internal_error", "The gateway failed on this request; its log says why.")


def openai_error(error: GatewayError) -> dict[str, Any]:
    """The OpenAI family's error object."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def chat_error(error: GatewayError) -> dict[str, Any]:
    """The error object of `/chat` and `/chat/stream`."""
    return {"message": error.message, "type": error.type, "code": error.code}


def openai_body(error: GatewayError) -> dict[str, Any]:
    """The body of an error answer of the OpenAI family, and of every route that has no family."""
    return {"error": openai_error(error)}


def chat_body(error: GatewayError) -> dict[str, Any]:
    """The body of an error answer of `/chat` and `/chat/stream`."""
    return {"error": chat_error(error)}


def anthropic_body(error: GatewayError) -> dict[str, Any]:
    """The body of an error answer of `/v1/messages`, and the data of its error event.

    The types are Anthropic's (https://docs.anthropic.com/en/api/errors); `code` is ours, which their clients
    leave alone.
    """
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPE_OF_STATUS.get(error.status, default)
    inner = {"type": kind, "message": error.message, "code": error.code}
    return {"type": "error", "error": inner | retry_hint(error)}


def retry_hint(error: GatewayError) -> dict[str, Any]:
    """What an error event has in place of the header `Retry-After`, in seconds."""
    return {} if error.retry_after is None else {"retry_after": error.retry_after}


class UpstreamFailure(Exception):
    """An engine that did not answer, or did not finish.

    `reason` is one of the labels of `vllm_gateway_upstream_errors_total`. `retryable` is true only while
    nothing of an answer has been read: a generation must never run twice for one answer.
    """

    def __init__(self, reason: str, detail: str, *, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


_UPSTREAM_ANSWERS: Mapping[str, tuple[int, str, str]] = {
    "connect": (503, "engine_unreachable", "The model's engine refuses connections; try again."),
    "connect_timeout": (503, "engine_unreachable", "The model's engine does not answer; try again."),
    "first_token_timeout": (504, "first_token_timeout", "The engine sent no token in time."),
    "idle_timeout": (504, "idle_timeout", "The engine stopped sending tokens."),
    "unary_timeout": (504, "engine_timeout", "The engine did not finish the answer in time."),
    "eof": (502, "engine_closed", "The engine closed the connection before the answer was complete."),
    "reset": (502, "engine_closed", "The connection to the engine broke before the answer was complete."),
    "closed_early": (502, "engine_closed", "The engine closed the connection without an answer."),
    "bad_response": (502, "engine_bad_response", "The engine's answer is not valid HTTP."),
    "too_large": (502, "engine_answer_too_large", "The engine's answer is larger than the gateway allows."),
    "draining": (503, "shutting_down", "The gateway is shutting down; try again."),
}


def from_failure(failure: UpstreamFailure) -> GatewayError:
    """The caller's view of an engine's failure. The detail (an address, an errno) stays in the log."""
    default = (502, "engine_failed", "The engine failed.")
    status, code, message = _UPSTREAM_ANSWERS.get(failure.reason, default)
    return GatewayError(status, code, message, retry_after=1 if status == 503 else None)


def from_engine(status: int, body: bytes, retry_after: str | None = None) -> GatewayError:
    """An engine's error answer, in one shape.

    vLLM 0.32 has four: `{"error": {...}}`, `{"error": "text"}`, `{"detail": "text"}` and
    `{"detail": [...]}`; a proxy in between may send anything.
    """
    message, code, param = _engine_words(body)
    text = message or f"The engine answered {status}."
    if status in (401, 403):  # the gateway's own key was refused: nothing that the caller can mend
        return GatewayError(502, "engine_refused_gateway", "The engine refused the gateway's key.")
    if status == 503:
        return GatewayError(503, "engine_overloaded", text, retry_after=_seconds(retry_after) or 1)
    if status == 429:
        return GatewayError(429, "rate_limited", text, retry_after=_seconds(retry_after) or 1)
    if status >= 500 or status < 400:
        return GatewayError(504 if status == 504 else 502, "engine_error", text)
    if status == 404 and text == _ROUTE_NOT_FOUND:
        return GatewayError(404, "route_not_offered", "The model's engine does not offer this route.")
    return GatewayError(status, code or "invalid_request", text, param=param)


def _engine_words(body: bytes) -> tuple[str | None, str | None, str | None]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None, None, None
    if not isinstance(document, dict):
        return None, None, None
    error = document.get("error", document.get("detail", document.get("message")))
    if isinstance(error, dict):
        code = error.get("code")
        return _text(error.get("message")), code if isinstance(code, str) else None, _text(error.get("param"))
    if isinstance(error, list):  # FastAPI's validation errors
        error = "; ".join(_validation_line(item) for item in error if isinstance(item, dict))
    return _text(error), None, None


def _validation_line(item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item.get("loc", ()) if part != "body")
    return f"{where}: {item.get('msg', 'is invalid')}" if where else str(item.get("msg", "is invalid"))


def _text(value: object) -> str | None:
    return value[:_ENGINE_MESSAGE_LIMIT] if isinstance(value, str) and value else None


def _seconds(retry_after: str | None) -> int | None:
    return int(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
