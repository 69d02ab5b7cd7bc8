"""The routes that lead to an engine, by exact path: what is not here never reaches one."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gateway.errors import GatewayError, chat_error, openai_error
from vllm_gateway.policy.keys import ANONYMOUS
from vllm_gateway.routing.pick import Hint
from vllm_gateway.routing.table import Model
from vllm_gateway.settings import RoutingSettings, Timeouts
from vllm_gateway.upstream.attempt import Call
from vllm_gateway.web import chat, openai, replay
from vllm_gateway.web.dialect import Dialect
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.openai import Request
from vllm_gateway.web.relay import RelayResponse
from vllm_gateway.web.services import Services

_MAX_SESSION = 256

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
        table = services.admission.view(services.table(), exchange.caller)
        streams = path in openai.STREAMING
        request = openai.understand(
            body, table, settings.limits, can_stream=streams, default=settings.default_model
        )
        dialect = openai.OpenAIDialect(settings.limits, strip_usage=request.strip_usage)
        await _relay(services, exchange, request, dialect, path, body)

    return handle


def _chat(*, stream: bool) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        body = await exchange.body(settings.limits)
        table = services.admission.view(services.table(), exchange.caller)
        request = chat.understand(body, table, settings.limits, stream=stream, default=settings.default_model)
        dialect = chat.ChatDialect(request.name)
        await _relay(services, exchange, request, dialect, chat.UPSTREAM_PATH, body)

    return handle


async def _relay(
    services: Services, exchange: Exchange, request: Request, dialect: Dialect, path: str, body: bytes
) -> None:
    timeouts = services.settings.timeouts
    call = Call(
        name=request.name,
        path=path,
        body_for=request.body_for,
        headers=exchange.headers,
        request_id=exchange.request_id,
        timeout=_first_token(timeouts) if request.stream else lambda _: timeouts.unary,
        timeout_reason="first_token_timeout" if request.stream else "unary_timeout",
        hint=_hint(services.settings.routing, exchange, request),
    )
    model = services.engines.balancer.model(request.models, call.hint)
    exchange.model = model.key
    answer, place = await replay.find(services, exchange, model, body)
    if answer is not None:
        exchange.respond(200, [(b"content-type", answer.kind), *replay.HIT], answer.body)
        return
    await RelayResponse(services, exchange, dialect, place).run(call, request, model)


def _hint(settings: RoutingSettings, exchange: Exchange, request: Request) -> Hint:
    """What routing may know. The prompt is looked at only where a model asks for it."""
    by_prefix = any((model.routing or settings.strategy) == "PrefixHash" for model in request.models)
    session = exchange.headers.get(settings.session_header.encode(), b"")[:_MAX_SESSION]
    return Hint(
        draw=random.random(),  # noqa: S311 - it breaks ties
        prefix=request.prefix() if by_prefix else "",
        session=session.decode("latin-1"),
        caller="" if exchange.caller is ANONYMOUS else exchange.caller.name,
    )


def _first_token(timeouts: Timeouts) -> Callable[[Model], float]:
    return lambda model: model.limits.first_token or timeouts.first_token


ROUTES: Mapping[str, Route] = {
    "/chat": Route(_chat(stream=False), chat_error),
    "/chat/stream": Route(_chat(stream=True), chat_error),
    **{path: Route(_openai(path), openai_error) for path in openai.ROUTES},
}
