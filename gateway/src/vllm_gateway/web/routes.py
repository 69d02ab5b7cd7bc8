"""The routes that lead to an engine, by exact path: what is not here never reaches one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gateway.errors import GatewayError, chat_error, openai_error
from vllm_gateway.routing.table import Model
from vllm_gateway.settings import Timeouts
from vllm_gateway.upstream.attempt import Call
from vllm_gateway.web import chat, openai
from vllm_gateway.web.dialect import Dialect
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.openai import Request
from vllm_gateway.web.relay import RelayResponse
from vllm_gateway.web.services import Services

Handler = Callable[[Services, Exchange], Awaitable[None]]
ErrorObject = Callable[[GatewayError], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """A POST route: how it is answered, and the shape of its errors."""

    handle: Handler
    error_object: ErrorObject


def _openai(path: str) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        body = await exchange.body(settings.limits)
        request = openai.understand(
            body,
            services.table(),
            settings.limits,
            can_stream=path in openai.STREAMING,
            default=settings.default_model,
        )
        dialect = openai.OpenAIDialect(settings.limits, strip_usage=request.strip_usage)
        await _relay(services, exchange, request, dialect, path)

    return handle


def _chat(*, stream: bool) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        body = await exchange.body(settings.limits)
        table = services.table()
        request = chat.understand(body, table, settings.limits, stream=stream, default=settings.default_model)
        await _relay(services, exchange, request, chat.ChatDialect(request.name), chat.UPSTREAM_PATH)

    return handle


async def _relay(
    services: Services, exchange: Exchange, request: Request, dialect: Dialect, path: str
) -> None:
    exchange.model = request.models[0].key
    timeouts = services.settings.timeouts
    call = Call(
        name=request.name,
        path=path,
        body_for=request.body_for,
        headers=exchange.headers,
        request_id=exchange.request_id,
        timeout=_first_token(timeouts) if request.stream else lambda _: timeouts.unary,
        timeout_reason="first_token_timeout" if request.stream else "unary_timeout",
    )
    limits = services.settings.limits
    relay = RelayResponse(services.engines, services.metrics, limits, timeouts, exchange, dialect)
    await relay.run(call, request.models)


def _first_token(timeouts: Timeouts) -> Callable[[Model], float]:
    return lambda model: model.limits.first_token or timeouts.first_token


ROUTES: Mapping[str, Route] = {
    "/chat": Route(_chat(stream=False), chat_error),
    "/chat/stream": Route(_chat(stream=True), chat_error),
    **{path: Route(_openai(path), openai_error) for path in openai.ROUTES},
}
