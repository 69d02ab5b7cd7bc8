"""Adds the relayed routes, which FastAPI never sees, to its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from vllm_gateway.web.chat import ChatRequest, ChatResponse
from vllm_gateway.web.routes import ANTHROPIC, CHAT, ROUTES, Route

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The body is not understood; the message names the field.",
    "401": "The API key is missing or wrong, where keys are used.",
    "403": "The API key may not use this model; the message lists those that it may.",
    "404": "No such model, with a list of those that are served; or its engine does not offer the route.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body has another content type.",
    "422": "The engine understood the body and cannot do what it says.",
    "429": "The key's limits are used up, or too many wait for the model; see Retry-After.",
    "500": "The gateway failed; its log says why.",
    "502": "The engine failed.",
    "503": "The model is not ready, or no place came free in time; the message says why; see Retry-After.",
    "504": "The engine was too slow.",
}
_OF_LISTS = {
    "/models": ("401", "429"),
    "/v1/models": ("401", "429"),
    "/v1/models/{name}": ("401", "403", "404", "429", "503"),
}
_EVENTS = {
    "chat": 'data: {"token": "Hello"}\n\ndata: {"done": true, "model": "m", "finish_reason": "stop"}\n\n',
    "openai": 'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\ndata: [DONE]\n\n',
    "anthropic": 'event: message_stop\ndata: {"type": "message_stop"}\n\n',
}
_TEXT = {"type": "string"}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "code": {"type": ["string", "integer", "null"]},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": _TEXT, "message": _TEXT, "code": _TEXT},
        },
    },
}


def describe_relayed_routes(api: FastAPI) -> None:
    """Extends the document that `/openapi.json` and `/docs` show."""
    without = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = without()
            _correct_lists(document)
            document["paths"] |= {path: _post(path, route) for path, route in ROUTES.items()}
            document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
        return api.openapi_schema or {}

    api.openapi = openapi  # type: ignore[method-assign]


def _correct_lists(document: dict[str, Any]) -> None:
    """FastAPI cannot know our errors, and tells of a 422 of its own that no caller gets."""
    for path, codes in _OF_LISTS.items():
        responses = document["paths"][path]["get"]["responses"]
        responses.pop("422", None)
        responses |= _errors(codes, "Error")
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _errors(codes: Iterable[str], schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}
    return {code: {"description": _ERRORS[code], "content": content} for code in codes}


def _post(path: str, route: Route) -> dict[str, Any]:
    answer = {"description": "The answer.", "content": _answer(path, route)}
    errors = _errors(_ERRORS, "AnthropicError" if route.family is ANTHROPIC else "Error")
    return {
        "post": {
            "tags": [route.family.name],
            "summary": route.summary,
            "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": _body(route)},
            "responses": {"200": answer, **errors},
        }
    }


def _body(route: Route) -> dict[str, Any]:
    if route.form:
        fields = {"file": {"type": "string", "format": "binary"}, "model": _TEXT, "stream": _TEXT}
        form = {"type": "object", "required": ["file"], "properties": fields}
        return {"multipart/form-data": {"schema": form}}
    if route.family is CHAT:
        return {"application/json": {"schema": {"$ref": _REF.format(model="ChatRequest")}}}
    properties: dict[str, Any] = {"model": {**_TEXT, "minLength": 1, "maxLength": 256}}
    if route.streams:
        properties["stream"] = {"type": "boolean"}
    return {"application/json": {"schema": {"type": "object", "properties": properties}}}


def _answer(path: str, route: Route) -> dict[str, Any]:
    whole: dict[str, Any] = {"type": "object"}
    if route.family is CHAT:
        whole = {"$ref": _REF.format(model="ChatResponse")}
    answer = {} if path == "/chat/stream" else {"application/json": {"schema": whole}}
    return answer | ({"text/event-stream": {"example": _EVENTS[route.family.name]}} if route.streams else {})


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {"Error": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    models: tuple[type[BaseModel], ...] = (ChatRequest, ChatResponse)
    for model in models:
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
