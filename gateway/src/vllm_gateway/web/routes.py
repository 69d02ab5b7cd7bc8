"""The routes that lead to an engine, by exact path: what is not here never reaches one."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gateway.errors import GatewayError, anthropic_body, chat_body, openai_body
from vllm_gateway.policy.keys import ANONYMOUS
from vllm_gateway.routing.pick import Hint
from vllm_gateway.settings import RoutingSettings
from vllm_gateway.upstream.attempt import Call
from vllm_gateway.web import audio, chat, openai, replay
from vllm_gateway.web.anthropic import AnthropicDialect
from vllm_gateway.web.dialect import Dialect
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.openai import OpenAIDialect, Reading, Request
from vllm_gateway.web.relay import RelayResponse
from vllm_gateway.web.responses import ResponsesDialect
from vllm_gateway.web.services import Services

_MAX_SESSION = 256

ErrorBody = Callable[[GatewayError], dict[str, Any]]
Handler = Callable[[Services, Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Family:
    """What the routes of one API have in common beside the dialect of their answers."""

    name: str
    error_body: ErrorBody


CHAT = Family("chat", chat_body)
OPENAI = Family("openai", openai_body)
ANTHROPIC = Family("anthropic", anthropic_body)
VLLM = Family("vllm", openai_body)


@dataclass(frozen=True, slots=True)
class Route:
    """A POST route that leads to an engine. `streams` and `form` say what its answers and bodies can be."""

    family: Family
    handle: Handler
    summary: str
    streams: bool = False
    form: bool = False


def _json(path: str, reading: Reading, dialect_of: Callable[[Services, Request], Dialect]) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        # No name for the body here: it would be held for as long as the answer takes.
        request = openai.understand(
            await exchange.body(settings.limits),
            services.admission.view(services.table(), exchange.caller),
            settings.limits,
            reading,
            settings.default_model,
        )
        await _relay(services, exchange, request, dialect_of(services, request), path)

    return handle


def _form(path: str) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        request = audio.understand(
            await exchange.form(settings.limits),
            exchange.headers[b"content-type"],
            services.admission.view(services.table(), exchange.caller),
            settings.default_model,
        )
        await _relay(services, exchange, request, _openai_dialect(services, request), path)

    return handle


def _chat(*, stream: bool) -> Handler:
    async def handle(services: Services, exchange: Exchange) -> None:
        settings = services.settings
        request = chat.understand(
            await exchange.body(settings.limits),
            services.admission.view(services.table(), exchange.caller),
            settings.limits,
            stream=stream,
            default=settings.default_model,
        )
        await _relay(services, exchange, request, chat.ChatDialect(request.name), chat.UPSTREAM_PATH)

    return handle


def _openai_dialect(services: Services, request: Request) -> Dialect:
    return OpenAIDialect(services.settings.limits, request.strip_usage, services.fingerprints)


def _responses_dialect(services: Services, _: Request) -> Dialect:
    return ResponsesDialect(services.settings.limits, strip_usage=False)


def _anthropic_dialect(services: Services, _: Request) -> Dialect:
    return AnthropicDialect(services.settings.limits)


async def _relay(
    services: Services, exchange: Exchange, request: Request, dialect: Dialect, path: str
) -> None:
    timeouts = services.settings.timeouts
    call = Call(
        name=request.name,
        path=path,
        body_for=request.body_for,
        headers=exchange.headers,
        request_id=exchange.request_id,
        seconds=timeouts.first_token if request.stream else timeouts.unary,
        first_token=request.stream,
        hint=_hint(services.settings.routing, exchange, request),
        content_type=request.content_type,
    )
    model = services.engines.balancer.model(request.models, call.hint)
    exchange.model = model.key
    answer = place = None
    if ttl := replay.seconds_kept(services.settings.response_cache, model):
        answer, place = await replay.find(services, exchange, model, request.body, ttl)
    if answer is not None:
        exchange.respond(200, [(b"content-type", answer.kind), *replay.HIT], answer.body)
        return
    await RelayResponse(services, exchange, dialect, place).run(call, request, model)


def _hint(settings: RoutingSettings, exchange: Exchange, request: Request) -> Hint:
    """What routing may know. The prompt is looked at only where a model asks for it."""
    prefix = ""
    for model in request.models:
        if (model.routing or settings.strategy) == "PrefixHash":
            prefix = request.prefix()
            break
    session = exchange.headers.get(settings.session_header.encode())
    return Hint(
        draw=random.random(),  # noqa: S311 - it breaks ties
        prefix=prefix,
        session=session[:_MAX_SESSION].decode("latin-1") if session else "",
        caller="" if exchange.caller is ANONYMOUS else exchange.caller.name,
    )


def _completions(path: str, summary: str) -> Route:
    reading = Reading(streams=True, ask_usage=True)
    return Route(OPENAI, _json(path, reading, _openai_dialect), summary, streams=True)


def _whole(path: str, summary: str, family: Family = OPENAI) -> Route:
    """A route that answers whole."""
    dialect = _anthropic_dialect if family is ANTHROPIC else _openai_dialect
    return Route(family, _json(path, Reading(), dialect), summary)


def _responses(path: str) -> Route:
    reading = Reading(streams=True, stored=True)
    return Route(OPENAI, _json(path, reading, _responses_dialect), "OpenAI's responses.", streams=True)


def _messages(path: str) -> Route:
    handle = _json(path, Reading(streams=True), _anthropic_dialect)
    return Route(ANTHROPIC, handle, "Anthropic's messages.", streams=True)


def _audio(path: str) -> Route:
    return Route(OPENAI, _form(path), "Text of an audio file.", streams=True, form=True)


_RERANK = "Documents in the order of their relevance to a query."
_SCORE = "How well texts fit together."
_COUNT = "How many tokens a message has, in Anthropic's words."

ROUTES: Mapping[str, Route] = {
    "/chat": Route(CHAT, _chat(stream=False), "One answer, whole."),
    "/chat/stream": Route(CHAT, _chat(stream=True), "One answer as events, a token each.", streams=True),
    "/v1/chat/completions": _completions("/v1/chat/completions", "A turn of a conversation."),
    "/v1/completions": _completions("/v1/completions", "How a text goes on."),
    "/v1/responses": _responses("/v1/responses"),
    "/v1/messages": _messages("/v1/messages"),
    "/v1/messages/count_tokens": _whole("/v1/messages/count_tokens", _COUNT, ANTHROPIC),
    "/v1/embeddings": _whole("/v1/embeddings", "Vectors of texts."),
    **{path: _whole(path, _RERANK) for path in ("/v1/rerank", "/v2/rerank", "/rerank")},
    **{path: _whole(path, _SCORE) for path in ("/v1/score", "/score")},
    **{path: _audio(path) for path in audio.ROUTES},
    "/tokenize": _whole("/tokenize", "The tokens of a text or of a conversation.", VLLM),
    "/detokenize": _whole("/detokenize", "The text of tokens.", VLLM),
}
