"""From an engine's answer to the caller's, in one place with one owner."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from vllm_gateway.deadlines import Limits
from vllm_gateway.errors import GatewayError, UpstreamFailure, from_engine, from_failure
from vllm_gateway.policy.cache import Answer
from vllm_gateway.policy.room import Held
from vllm_gateway.routing.balance import WELL
from vllm_gateway.routing.table import Model
from vllm_gateway.settings import Timeouts
from vllm_gateway.telemetry import Gaps
from vllm_gateway.upstream.attempt import Call, Upstream
from vllm_gateway.upstream.sse import Events, has_data
from vllm_gateway.upstream.template import Templates
from vllm_gateway.web.channel import Channel, Headers
from vllm_gateway.web.dialect import Account, Dialect, StreamDialect
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.openai import Request
from vllm_gateway.web.replay import MISS, Place, RecordedStream
from vllm_gateway.web.services import Services
from vllm_gateway.web.stall import StallWatch
from vllm_gateway.web.tokens import Tokens
from vllm_gateway.web.waiting import wait_for_place

_LOG = logging.getLogger("vllm_gateway.relay")
_MAX_ERROR_BODY = 64 * 1024
_EVENT_STREAM = b"text/event-stream"
_SSE_HEADERS: Headers = [
    (b"content-type", _EVENT_STREAM + b"; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = ord(":")


class Stream:
    """Carries one stream: the upstream connection's sink and the caller's flow.

    Everything here runs inside the event loop's callbacks; the owner only waits for `done`. That is
    cancelled with it: `ended` says whether the stream has ended.
    """

    def __init__(
        self,
        channel: Channel,
        upstream: Upstream,
        dialect: StreamDialect,
        gaps: Gaps,
        templates: Templates,
        timeouts: Timeouts,
        limits: Limits,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._channel = channel
        self.upstream = upstream
        self.dialect = dialect
        self._events = events = Events()
        self.tokens = Tokens(
            channel, upstream.connection, events, dialect, gaps, templates, loop.time, upstream.sent_at
        )
        own = upstream.model.limits
        self._first_token_timeout = own.first_token or timeouts.first_token
        self._idle_timeout = own.idle or timeouts.idle
        self._write_stall = timeouts.write_stall
        self._stalled: StallWatch | None = None
        self.first_token_at: float | None = None
        self.outcome = "client_closed"  # until the stream ends in another way
        self.failure: UpstreamFailure | None = None
        self.ended = False
        self.done: asyncio.Future[None] = loop.create_future()
        self._watchdog: asyncio.TimerHandle | None = None
        self._first_look = limits.of(self._idle_timeout)
        if self._deadline() < loop.time() + self._idle_timeout:
            self._watchdog = self._look_again()
        else:
            self._first_look.begin(self)

    # upstream.client.Sink

    def data(self, payload: bytes) -> None:
        if self.ended:  # the engine may still send, until its connection closes
            return
        sent = self._take(payload)
        if sent:
            self._channel.write(sent)

    def _take(self, payload: bytes) -> bytes:
        """What is sent for a read, which it accounts for."""
        block = self._events.feed(payload)
        if not block:
            return b""
        sent = self.dialect.block(block)
        if block[0] == _COMMENT and not has_data(block):
            return sent
        if self.first_token_at is not None:
            self.tokens.more(block)
        elif self.dialect.has_token(block):
            self.tokens.first(block)
            self.first_token_at = self.tokens.last
            self.upstream.generates()
        return sent

    def end(self, payload: bytes) -> None:
        """The engine's body is complete; the stream is, if its terminator has come."""
        if self.ended:
            return
        account = self.dialect.account
        last = self._take(payload)
        if account.failure is not None:
            self._finish(account.failure, last + self.dialect.end())
        elif account.done:
            self._finish("complete", last + self.dialect.end())
        else:
            if last:
                self._channel.write(last)
            self.failed(UpstreamFailure("eof", "the stream ended without its terminator"))

    def failed(self, failure: UpstreamFailure) -> None:
        """One error event at an event's boundary; in the middle of a huge event only a cut is honest."""
        if self.ended:
            return
        if self.dialect.account.done:  # everything was there but the framing's end
            self._finish(self.dialect.account.failure or "complete", self.dialect.end())
            return
        self.failure = failure
        if self._events.inside:
            self._finish(failure.reason, None)
        else:
            self._finish(failure.reason, self.dialect.failed(from_failure(failure)))

    # web.channel.Flow

    def pause(self) -> None:
        self.upstream.connection.pause()
        if self._stalled is None:
            unread = self._channel.unread
            self._stalled = StallWatch(self._loop, self._write_stall, unread, self._give_up_writing)

    def resume(self) -> None:
        if self._stalled is not None:
            self._stalled.stop()
            self._stalled = None
        self.tokens.last = self._loop.time()  # the engine could not show progress meanwhile
        self.upstream.connection.resume()

    def lost(self) -> None:
        self.tokens.close()
        if self._stalled is not None:
            self._stalled.stop()
            self._stalled = None

    # Ends

    def close(self) -> None:
        """Stops the timers; nothing is delivered any more. Safe to call twice."""
        if self.ended:
            return
        self.ended = True
        if not self.done.done():  # cancelled with the owner, who waits for it
            self.done.set_result(None)
        self._first_look.end(self)
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._stalled is not None:
            self._stalled.stop()
        self._channel.flow = None
        self.tokens.close()

    def _finish(self, outcome: str, last: bytes | None) -> None:
        if self.ended:
            return
        self.outcome = outcome
        if last is None:
            self._channel.abort()
        else:
            self._channel.finish(last)
        self.close()

    def _give_up_writing(self) -> None:
        self._stalled = None
        self._finish("write_stall", None)

    def _deadline(self) -> float:
        waiting = self.first_token_at is None
        return self.tokens.last + (self._first_token_timeout if waiting else self._idle_timeout)

    def _look_again(self) -> asyncio.TimerHandle:
        """At the deadline; before the first token no later than the idle timeout, which counts from it on."""
        deadline, latest = self._deadline(), self._loop.time() + self._idle_timeout
        if self._stalled is not None or (self.first_token_at is None and latest < deadline):
            deadline = latest
        return self._loop.call_at(deadline, self.too_late)

    def too_late(self) -> None:
        """Runs once a timeout, not once an event: it looks when the last event was. The first time called by
        the limit that streams have in common, then by this one's own timer.
        """
        if self._stalled is not None or self._loop.time() < self._deadline():
            self._watchdog = self._look_again()
            return
        reason = "first_token_timeout" if self.first_token_at is None else "idle_timeout"
        self.failed(UpstreamFailure(reason, "no token in time"))


class WholeBody:
    """Collects an answer that is no stream. Holding it until it is whole means that it is never cut."""

    def __init__(self, limit: int, held: Held) -> None:
        self._left = limit
        self._held = held
        self._pieces: list[bytes] = []
        self._whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def data(self, payload: bytes) -> None:
        self._left -= len(payload)
        if self._left < 0:
            self.failed(UpstreamFailure("too_large", "the answer is over limits.answerBytes"))
            return
        try:
            self._held.add(len(payload))
        except GatewayError as no_room:
            self._give_up(no_room)
        else:
            self._pieces.append(payload)

    def end(self, payload: bytes) -> None:
        if payload:
            self.data(payload)
        if not self._whole.done():
            self._whole.set_result(b"".join(self._pieces))

    def failed(self, failure: UpstreamFailure) -> None:
        self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._pieces.clear()
        if not self._whole.done():
            self._whole.set_exception(error)

    async def read(self, upstream: Upstream, until: float) -> bytes:
        """`until` is the loop's time. Raises UpstreamFailure, or a 503 where there is no room for it."""
        upstream.connection.start(self)
        try:
            async with asyncio.timeout_at(until):
                return await self._whole
        except TimeoutError:
            raise UpstreamFailure("unary_timeout", "the answer was not complete in time") from None


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class RelayResponse:
    """Owns the place and the upstream connection of one request, with its count, in the request's own task.

    No background task and no dependency releases anything: leaving `run`, however that happens, does.
    `place` is where the answer is kept, if it is; `stream` is the answer, once it has begun to be one.
    """

    services: Services
    exchange: Exchange
    dialect: Dialect
    place: Place | None = None
    stream: Stream | None = field(default=None, init=False)

    async def run(self, call: Call, request: Request, model: Model) -> None:
        """Answers the exchange from `model`, or from one that shares its name where that fails.

        Raises GatewayError and UpstreamFailure, while nothing has been answered or with `error_event` set.
        """
        services, models = self.services, request.models
        with services.queues.enter(model, call.name) as ticket:
            if not ticket.granted:
                begin = self._begin if request.stream else None
                seconds = services.settings.queue.keep_alive
                await wait_for_place(ticket, self.exchange, begin, seconds, services.metrics)
                models = services.table().now(models, call.name)
            call.arrived = self._arrived
            try:
                upstream = await services.engines.open(call, models)
            except asyncio.CancelledError:
                self._end_stream()  # it may have begun already
                raise
            try:
                request.let_go()
                self.exchange.body_held.let_go()
                self.exchange.model = upstream.model.key
                if self.stream is not None:
                    await self._rest(self.stream)
                elif upstream.well:
                    await self._unary(upstream)
                else:
                    await self._refuse(upstream)
            finally:
                services.engines.close(upstream)

    def _begin(self) -> None:
        """A stream's head before an engine has answered: what goes wrong from now on is an event."""
        self.exchange.error_event = self.dialect.stream().failed
        self.exchange.start(200, self._with_cache(_SSE_HEADERS))

    def _arrived(self, upstream: Upstream) -> None:
        """Begins the stream, if the answer is one."""
        if not upstream.head.headers.get(b"content-type", b"").lower().startswith(_EVENT_STREAM):
            return
        exchange, channel, model = self.exchange, self.exchange.channel, upstream.model.key
        dialect = self.dialect.stream(upstream.endpoint.id)
        if self.place is not None and self.place.model == model:
            dialect = RecordedStream(dialect, self.place.limit)
        services = self.services
        self.stream = stream = Stream(
            channel,
            upstream,
            dialect,
            services.metrics.gaps_of(model),
            services.templates,
            services.settings.timeouts,
            services.engines.client.limits,
        )
        channel.flow = stream
        exchange.model, exchange.error_event = model, None
        if not channel.started:
            exchange.start(200, self._with_cache(_SSE_HEADERS))
        upstream.connection.start(stream, stream.tokens)
        channel.flush()

    async def _rest(self, stream: Stream) -> None:
        try:
            await self.exchange.channel.wait(stream.done)
        except asyncio.CancelledError:
            pass  # the stream's end says why
        finally:
            self._end_stream()
        if stream.outcome == WELL and isinstance(stream.dialect, RecordedStream):
            self._keep(_SSE_HEADERS[0][1], stream.dialect.recorder.body())

    def _end_stream(self) -> None:
        stream, self.stream = self.stream, None  # which knows, by its call, this object
        if stream is None:
            return
        if not (stream.ended or self.exchange.channel.gone):  # the owner was cancelled, not left
            stream.failed(UpstreamFailure("draining", "the gateway stops"))
        stream.close()
        self._record_stream(stream)

    async def _unary(self, upstream: Upstream) -> None:
        self._not_begun()
        upstream.generates()
        body = await self._read(upstream, self.services.settings.limits.answer_bytes)
        upstream.outcome = WELL
        account = Account()
        answer = self.dialect.unary(body, account)
        kind = upstream.head.headers.get(b"content-type", b"application/json")
        self.exchange.respond(upstream.head.status, self._with_cache([(b"content-type", kind)]), answer)
        self._charge(account)
        if self.place is not None and self.place.model == upstream.model.key and upstream.head.status == 200:
            self._keep(kind, answer if len(answer) <= self.place.limit else None)

    async def _refuse(self, upstream: Upstream) -> None:
        head = upstream.head
        body = await self._read(upstream, _MAX_ERROR_BODY)
        error = from_engine(head.status, body, head.header(b"retry-after"))
        allowed = self.dialect.refusal(head.status, body)
        if allowed is None or self.exchange.error_event is not None:
            raise error
        self.exchange.outcome = error.code
        self.exchange.respond(head.status, [(b"content-type", b"application/json")], allowed)

    async def _read(self, upstream: Upstream, limit: int) -> bytes:
        # Of the one time that the answer has, its head has taken some. What came with the head needs none.
        until = upstream.sent_at + self.services.settings.timeouts.unary
        try:
            return await WholeBody(limit, self.exchange.body_held).read(upstream, until)
        except UpstreamFailure as failure:
            upstream.outcome = failure.reason
            self.services.metrics.upstream_error(upstream.model.key, failure.reason)
            raise

    def _not_begun(self) -> None:
        """A stream was asked for and begun, and the engine answers with something else."""
        if self.exchange.error_event is not None:
            raise GatewayError(502, "engine_bad_response", "The engine's answer is no stream.")

    def _with_cache(self, headers: Headers) -> Headers:
        return headers if self.place is None else [*headers, *MISS]

    def _keep(self, kind: bytes, body: bytes | None) -> None:
        if self.place is not None and body is not None:
            self.services.answers.put(self.place.key, Answer(kind, body), self.place.ttl)

    def _charge(self, account: Account) -> None:
        """By the engine's own count; by events where a stream broke before it came."""
        exchange, prompt = self.exchange, account.prompt_tokens
        completion = account.completion_tokens or account.token_events
        exchange.prompt_tokens, exchange.completion_tokens = prompt, completion
        self.services.admission.rates.charge(exchange.caller, prompt + completion)

    def _record_stream(self, stream: Stream) -> None:
        upstream, account = stream.upstream, stream.dialect.account
        self.exchange.outcome = self.exchange.stream_outcome = stream.outcome
        self.exchange.first_token_at = stream.first_token_at
        self._charge(account)
        failed = stream.failure.reason if stream.failure is not None else account.failure
        upstream.outcome = WELL if stream.outcome == WELL else failed
        if failed is not None and failed != "draining":
            key = upstream.model.key
            self.services.metrics.upstream_error(key, failed)
            detail = str(stream.failure or account.failure)
            _LOG.warning("stream failed", extra={"fields": {"model": key, "detail": detail}})
