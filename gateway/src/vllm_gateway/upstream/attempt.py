"""One request to an engine: choose, count, send, and try elsewhere while nothing has been answered."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_gateway.errors import UpstreamFailure
from vllm_gateway.routing.balance import Balancer, untried
from vllm_gateway.routing.load import Load
from vllm_gateway.routing.pick import Hint, by_weight
from vllm_gateway.routing.table import Endpoint, Model, not_ready
from vllm_gateway.upstream.client import Client, Connection
from vllm_gateway.upstream.http1 import Head

_LOG = logging.getLogger("vllm_gateway.upstream")
MAX_ATTEMPTS = 3
_RETRYABLE_STATUS = frozenset({500, 502, 503})
_FORWARDED = (b"user-agent", b"traceparent", b"tracestate")


class Observer(Protocol):
    """Who counts what happens on the way to an engine."""

    def upstream_error(self, model: str, reason: str) -> None: ...
    def retry(self) -> None: ...


class RetryBudget:
    """Bounds retries to a fifth of the requests, so that a fleet in trouble does not get twice the load.

    A small reserve lets a quiet gateway retry at all.
    """

    def __init__(self, *, share: float = 0.2, reserve: float = 10.0) -> None:
        self._share = share
        self._reserve = reserve
        self._left = reserve

    def deposit(self) -> None:
        """Counts a request."""
        self._left = min(self._reserve, self._left + self._share)

    def withdraw(self) -> bool:
        """Takes one retry, if there is one."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class Call:
    """What is sent: a POST of `body` to `path`. `body_for` splices the engine's name of the model.

    `seconds` is how long the answer's head may take; that of a stream (`first_token`) a model may say itself.
    `arrived` is called with an answer of 2xx as its head comes, before `Engines.open` returns it; where that
    raises after all, because the caller has left, the connection is closed.
    """

    name: str
    path: str
    body_for: Callable[[Model], bytes]
    headers: Mapping[bytes, bytes]
    request_id: str
    seconds: float
    first_token: bool
    hint: Hint
    content_type: str = "application/json"
    arrived: Callable[[Upstream], None] | None = None


@dataclass(slots=True)
class Upstream:
    """An engine's answer: the body is on `connection`, behind the head. `sent_at` is the loop's time.

    Whoever reads the body calls `generates` when it sees that the engine does, not only its server, and says
    in `outcome` how it ended, as `Balancer.report` takes it.
    """

    call: Call
    model: Model
    endpoint: Endpoint
    connection: Connection
    sent_at: float
    generates: Callable[[], None]
    head: Head = field(init=False)
    outcome: str | None = None

    @property
    def well(self) -> bool:
        return 200 <= self.head.status < 300

    def arrived(self, head: Head) -> None:
        self.head = head
        if self.call.arrived is not None and self.well:
            self.call.arrived(self)


@dataclass(slots=True)
class Engines:
    """Sends calls to the models' endpoints. `behind` are those that took their former key when last asked."""

    client: Client
    balancer: Balancer
    observer: Observer
    budget: RetryBudget = field(default_factory=RetryBudget)
    behind: set[str] = field(default_factory=set)

    @property
    def load(self) -> Load:
        """What is in flight where."""
        return self.balancer.load

    async def open(self, call: Call, models: Sequence[Model]) -> Upstream:
        """The first answer that is not worth a retry. It has its place in the counts until `close`.

        Raises UpstreamFailure where no engine answered, GatewayError (503) where no model has an endpoint.
        """
        self.budget.deposit()
        load = self.balancer.load
        tried: list[str] = []
        while True:
            model, endpoint = self._choose(call, models, tried)
            tried.append(endpoint.id)
            upstream = None
            load.take(model.key, endpoint.id)
            try:
                upstream = await self._try(call, models, model, endpoint, tried)
            finally:
                if upstream is None:
                    load.give_back(model.key, endpoint.id)
            if upstream is not None:
                return upstream
            self.observer.retry()

    def close(self, upstream: Upstream) -> None:
        """Gives back what `open` took. The connection goes to the pool if its answer was read."""
        endpoint = upstream.endpoint
        self.balancer.load.give_back(upstream.model.key, endpoint.id)
        self.client.release(endpoint, upstream.connection)
        self.balancer.report(endpoint, upstream.outcome)

    def _choose(self, call: Call, models: Sequence[Model], tried: list[str]) -> tuple[Model, Endpoint]:
        fresh = [model for model in models if untried(model, tried)] if tried else models
        model = by_weight(fresh or models, call.hint)
        if model is None:
            raise not_ready(call.name, models)
        return model, self.balancer.endpoint(model, tried, call.hint)

    async def _try(
        self, call: Call, models: Sequence[Model], model: Model, endpoint: Endpoint, tried: list[str]
    ) -> Upstream | None:
        """The answer of `endpoint`, or None where the call should be tried again."""
        self.balancer.health.chosen(endpoint.id)
        fresh = len(tried) > 1
        try:
            if endpoint.former_key is None:
                upstream = await self._exchange(call, model, endpoint, endpoint.key, fresh=fresh)
            else:
                upstream = await self._with_either(call, model, endpoint, fresh=fresh)
        except UpstreamFailure as failure:
            self.observer.upstream_error(model.key, failure.reason)
            # A reused connection that was closed says nothing against its endpoint.
            stale = failure.retryable and failure.reason == "closed_early"
            self.balancer.report(endpoint, None if stale else failure.reason)
            # That is the engine's or a proxy's habit, and no load to bound; the next connection is a new one.
            if stale or (failure.retryable and self._may_retry(models, tried)):
                return None
            raise
        except BaseException:  # the caller left
            self.balancer.report(endpoint, None)
            raise
        status = upstream.head.status
        if status in _RETRYABLE_STATUS:
            upstream.outcome = f"status_{status}"
            self.observer.upstream_error(model.key, upstream.outcome)
            if self._may_retry(models, tried):
                upstream.connection.close()
                self.balancer.report(endpoint, upstream.outcome)
                return None
        return upstream

    def _may_retry(self, models: Sequence[Model], tried: list[str]) -> bool:
        others = any(untried(model, tried) for model in models)
        return len(tried) < MAX_ATTEMPTS and others and self.budget.withdraw()

    def follow(self, models: Mapping[str, Model]) -> None:
        """The table was swapped."""
        self.behind &= {endpoint.id for model in models.values() for endpoint in model.endpoints}

    async def _with_either(self, call: Call, model: Model, endpoint: Endpoint, *, fresh: bool) -> Upstream:
        """Asks once more, with the other key, an engine that refuses the one of the two that it is likely to
        want: it has generated nothing, so this is neither a retry nor a failure.
        """
        first, other = endpoint.key, endpoint.former_key
        if endpoint.id in self.behind:
            first, other = other, first
        upstream = await self._exchange(call, model, endpoint, first, fresh=fresh)
        if upstream.head.status != 401 or other is None:
            return upstream
        upstream.connection.close()
        upstream = await self._exchange(call, model, endpoint, other, fresh=True)
        if upstream.head.status != 401:
            self._remember(endpoint, other)
        return upstream

    def _remember(self, endpoint: Endpoint, key: str) -> None:
        behind = key == endpoint.former_key
        (self.behind.add if behind else self.behind.discard)(endpoint.id)
        which = "from before" if behind else "in force"
        _LOG.info("engine takes the other key", extra={"fields": {"endpoint": endpoint.id, "key": which}})

    async def _exchange(
        self, call: Call, model: Model, endpoint: Endpoint, key: str | None, *, fresh: bool
    ) -> Upstream:
        idle = None if fresh else self.client.idle(endpoint)
        connection = idle or await self.client.dial(endpoint)
        sent_at = asyncio.get_running_loop().time()
        seconds = (model.limits.first_token or call.seconds) if call.first_token else call.seconds
        generates = functools.partial(self.balancer.health.proved, endpoint.id)
        upstream = Upstream(call, model, endpoint, connection, sent_at, generates)
        try:
            request = request_bytes(call, endpoint, call.body_for(model), key)
            await connection.exchange(request, self.client.limits.of(seconds), upstream.arrived)
        except TimeoutError as error:
            connection.close()
            reason = "first_token_timeout" if call.first_token else "unary_timeout"
            raise UpstreamFailure(reason, "no response head in time") from error
        except BaseException as error:
            connection.close()
            if isinstance(error, UpstreamFailure) and error.retryable:  # the race for an idle one was lost
                self.client.distrust(endpoint, connection)
            raise
        return upstream


def request_bytes(call: Call, endpoint: Endpoint, body: bytes, key: str | None) -> bytes:
    """The request as it goes to the engine, with a key of its.

    The caller's headers are not forwarded but for a few by name: hop-by-hop headers, credentials, cookies
    and vLLM's control headers (data-parallel rank, load metrics) stop here.
    """
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    authorization = "" if key is None else f"authorization: Bearer {key}\r\n"
    head = (
        f"POST {endpoint.prefix}{call.path} HTTP/1.1\r\n"
        f"host: {host}:{endpoint.port}\r\n"
        f"content-type: {call.content_type}\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {call.request_id}\r\n{authorization}".encode("latin-1")
    )
    for name in _FORWARDED:
        if name in call.headers:
            head += b"%b: %b\r\n" % (name, call.headers[name])
    return head + b"\r\n" + body
