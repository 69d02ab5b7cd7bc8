"""Errors of the FastAPI routes, in the same shape as those of the relayed ones."""

from __future__ import annotations

import json
import re

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from vllm_gateway.errors import GatewayError, bad_request, internal_error, openai_body
from vllm_gateway.web.openai import stored_not_kept

# What OpenAI's clients ask for a stored response: retrieve, delete, cancel, its input items, compact.
_STORED = re.compile(r"/v1/responses/[^/]+(/(cancel|input_items|compact))?")


def response_for(error: GatewayError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    body = json.dumps(openai_body(error))
    return Response(body, error.status, headers, media_type="application/json")


async def _gateway_error(_: Request, error: GatewayError) -> Response:
    return response_for(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404 and _STORED.fullmatch(request.url.path):
        return response_for(stored_not_kept(where))
    if error.status_code == 404:
        return response_for(GatewayError(404, "not_found", f"There is no {where}; see GET /docs."))
    if error.status_code == 405:
        response = response_for(GatewayError(405, "method_not_allowed", f"{where} is not allowed."))
        response.headers.update(error.headers or {})
        return response
    return response_for(GatewayError(error.status_code, "http_error", str(error.detail)))


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    return response_for(bad_request(str(error)))


async def _unexpected(_: Request, __: Exception) -> Response:
    return response_for(internal_error())


def register(app: FastAPI) -> None:
    app.exception_handler(GatewayError)(_gateway_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(Exception)(_unexpected)
