"""Adds the relayed routes, which FastAPI never sees, to its OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from vllm_gateway.web.chat import ChatRequest, ChatResponse
from vllm_gateway.web.openai import ROUTES

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The body is not understood; `param` names the field.",
    "401": "The API key is missing or wrong, where keys are used.",
    "403": "The API key may not use this model; the message lists those that it may.",
    "404": "No such model; the message lists those that are served.",
    "413": "The body is too large.",
    "429": "The key's limits are used up, or too many wait for the model; see Retry-After.",
    "502": "The engine failed.",
    "503": "The model is not ready, or no place came free in time; the message says why; see Retry-After.",
    "504": "The engine was too slow.",
}


def describe_relayed_routes(api: FastAPI) -> None:
    """Extends the document that `/openapi.json` and `/docs` show."""
    without = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = without()
            document["paths"] |= _paths()
            document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
        return api.openapi_schema or {}

    api.openapi = openapi  # type: ignore[method-assign]


def _paths() -> dict[str, Any]:
    chat_body = {"$ref": _REF.format(model="ChatRequest")}
    answer = {"application/json": {"schema": {"$ref": _REF.format(model="ChatResponse")}}}
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    paths: dict[str, Any] = {
        "/chat": _post("chat", "One answer, whole.", chat_body, answer),
        "/chat/stream": _post("chat", "One answer as events, a token each.", chat_body, events),
    }
    for path in ROUTES:
        text = "OpenAI-compatible; the body goes to vLLM as it is."
        anything = {"application/json": {"schema": {"type": "object"}}, **events}
        paths[path] = _post("openai", text, {"type": "object"}, anything)
    return paths


def _post(tag: str, summary: str, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": answer}}
    responses |= {code: {"description": text} for code, text in _ERRORS.items()}
    content = {"application/json": {"schema": body}}
    return {
        "post": {
            "tags": [tag],
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": responses,
        }
    }


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    models: tuple[type[BaseModel], ...] = (ChatRequest, ChatResponse)
    for model in models:
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
