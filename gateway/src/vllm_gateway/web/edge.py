"""The outermost ASGI application: the relayed routes by itself, everything else by FastAPI.

FastAPI's middleware would wrap every event of a stream; so CORS, request ids, metrics and the access log are
plain functions that both paths pass through here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vllm_gateway.errors import (
    GatewayError,
    UpstreamFailure,
    from_failure,
    internal_error,
    openai_body,
    shutting_down,
)
from vllm_gateway.policy.limits import request_id
from vllm_gateway.telemetry import REFUSALS
from vllm_gateway.tracing import Tracing
from vllm_gateway.web.channel import AsgiChannel, Channel, Message, Receive, Scope, Send
from vllm_gateway.web.cors import CorsPolicy, is_preflight
from vllm_gateway.web.exchange import Disconnected, Exchange
from vllm_gateway.web.records import fields_of, status_of
from vllm_gateway.web.routes import ROUTES, ErrorBody, Handler
from vllm_gateway.web.services import CALLER, Services
from vllm_gateway.web.turn import Turn

_LOG = logging.getLogger("vllm_gateway.web")
_ALLOWED = b"POST, OPTIONS"  # of the relayed routes
_OPEN = frozenset({"/health", "/docs", "/docs/oauth2-redirect", "/openapi.json"})  # never need a key
_KNOWN_PATHS = frozenset({"/models", "/health", "/v1/models", "/docs", "/openapi.json"})

AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Lifespan = Callable[[], Awaitable[None]]


class Edge:
    """One gateway as an ASGI application. `start` and `stop` are its lifespan."""

    def __init__(self, services: Services, api: AsgiApp, start: Lifespan, stop: Lifespan) -> None:
        self._services = services
        self._api = api
        self._start = start
        self._stop = stop
        self._cors = CorsPolicy(services.settings.cors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    async def relay(self, turn: Turn) -> None:
        """Answers a POST to a relayed route below ASGI."""
        services, (path, route) = self._services, turn.target
        exchange = self._exchange("POST", path, dict(turn.headers), turn, route.family.error_body)
        try:
            if services.tracing is not None:
                _trace(services.tracing, exchange)
            if turn.behind:
                await turn.ready()
            await services.admission.admit(exchange)
            await route.handle(services, exchange)
        except asyncio.CancelledError:
            if not turn.gone:  # the server's doing; a caller that left is no error
                await self._fail(exchange, shutting_down())
        except Exception as problem:  # noqa: BLE001 - the last resort: the caller gets an answer
            await self._failed(exchange, problem)
        finally:
            if not (turn.finished or turn.gone):
                turn.abort()  # nobody will answer it any more
            self._end(exchange)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        method, path = scope["method"], scope["path"]
        # As it was written: a proxy in front that judges paths must not read another one than this gateway.
        route = ROUTES.get(scope["raw_path"].decode("latin-1"))
        known = route is not None or path in _KNOWN_PATHS
        channel = AsgiChannel(receive, send)
        error_body = route.family.error_body if route is not None else openai_body
        exchange = self._exchange(method, path if known else "other", headers, channel, error_body)
        try:
            if is_preflight(method, headers):
                exchange.respond(204, self._cors.preflight(headers), b"")
            elif route is None:
                await self._by_fastapi(exchange, scope, receive, send)
            elif method == "OPTIONS":
                exchange.respond(204, [(b"allow", _ALLOWED)], b"")
            elif method != "POST":
                await exchange.respond_error(_not_post(method, path))
            else:
                await self._relayed(exchange, route.handle)
            await channel.close()
        except asyncio.CancelledError:
            if not channel.gone:
                raise  # the server's doing; a caller that left is no error
        finally:
            self._end(exchange)

    def _exchange(
        self, method: str, route: str, headers: dict[bytes, bytes], channel: Channel, error_body: ErrorBody
    ) -> Exchange:
        services, identity = self._services, request_id(headers)
        common = [(b"x-request-id", identity.encode("ascii"))]
        if b"origin" in headers:
            common += self._cors.headers(headers)
        if services.lifecycle.draining:
            common.append((b"connection", b"close"))
        return Exchange(method, route, headers, identity, common, channel, services.room, error_body)

    async def _relayed(self, exchange: Exchange, handle: Handler) -> None:
        """The same through ASGI."""
        if self._services.tracing is not None:
            _trace(self._services.tracing, exchange)
        try:
            await self._services.admission.admit(exchange)
            await handle(self._services, exchange)
        except asyncio.CancelledError:
            if exchange.channel.gone:
                raise
            await self._fail(exchange, shutting_down())
        except Exception as problem:  # noqa: BLE001 - as above
            await self._failed(exchange, problem)

    async def _failed(self, exchange: Exchange, problem: Exception) -> None:
        """Answers what was raised; of what nobody expected, the log has the trace."""
        if isinstance(problem, GatewayError):
            await self._fail(exchange, problem)
        elif isinstance(problem, Disconnected):
            exchange.channel.gone = True
        elif isinstance(problem, UpstreamFailure):
            _LOG.warning("engine failed", extra={"fields": fields_of(exchange) | {"detail": str(problem)}})
            await self._fail(exchange, from_failure(problem))
        else:
            _LOG.error("request failed", exc_info=problem, extra={"fields": fields_of(exchange)})
            await self._fail(exchange, internal_error())

    async def _fail(self, exchange: Exchange, error: GatewayError) -> None:
        exchange.let_go()  # now: what is left of a refused request's body is waited for
        if exchange.channel.finished:
            return  # the caller has its answer, and keeps it
        self._services.metrics.refused(error.code)
        if exchange.error_event is not None:  # it waited in the queue, and its head has gone out
            exchange.outcome = error.code
            # An engine's own words never become a label.
            outcome = error.code if error.status >= 500 or error.code in REFUSALS else "refused"
            self._services.metrics.streams_ended.labels(exchange.model, outcome).inc()
            exchange.channel.finish(exchange.error_event(error))
        elif exchange.channel.started:
            exchange.channel.abort()
        else:
            await exchange.respond_error(error)

    async def _by_fastapi(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *exchange.common]}
            await send(message)

        if scope["path"] not in _OPEN:
            try:
                await self._services.admission.admit(exchange)
            except GatewayError as error:
                await self._fail(exchange, error)
                return
        await self._api({**scope, CALLER: exchange.caller}, receive, send_with_headers)

    def _end(self, exchange: Exchange) -> None:
        """Gives back what the request held, and records it."""
        exchange.body_held.let_go()
        exchange.let_go()
        exchange.ended_at = asyncio.get_running_loop().time()
        if not exchange.status:
            exchange.outcome = "client_closed"
        if exchange.trace is not None:
            tokens = exchange.prompt_tokens, exchange.completion_tokens
            exchange.trace.end(exchange.route, exchange.model, status_of(exchange), exchange.outcome, tokens)
        self._services.records.add(exchange)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _trace(tracing: Tracing, exchange: Exchange) -> None:
    exchange.trace = tracing.begin(exchange.method, exchange.route, exchange.headers, exchange.request_id)
    exchange.headers = exchange.trace.headers


def _not_post(method: str, path: str) -> GatewayError:
    text = f"{path} takes POST, not {method}."
    return GatewayError(405, "method_not_allowed", text, allow=_ALLOWED.decode())
