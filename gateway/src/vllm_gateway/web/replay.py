"""The response cache on a request's path: looked up before the queue, filled after a whole answer."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.cache import Answer, Recorder, cache_key
from vllm_gateway.routing.table import Model
from vllm_gateway.settings import CacheSettings
from vllm_gateway.web.channel import Headers
from vllm_gateway.web.dialect import Account, StreamDialect
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.services import Services

HIT: Headers = [(b"x-cache", b"hit")]
MISS: Headers = [(b"x-cache", b"miss")]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the answer to a request is kept once it is whole: only what `model` itself answered."""

    key: str
    ttl: float
    model: str
    limit: int


def seconds_kept(settings: CacheSettings, model: Model) -> float:
    """For how long the model's answers are kept; 0 where they are not."""
    return settings.ttl if model.limits.cache_ttl is None else model.limits.cache_ttl


async def find(
    services: Services, exchange: Exchange, model: Model, body: bytes, ttl: float
) -> tuple[Answer | None, Place | None]:
    """An answer to the same request, and where to keep a new one for `ttl` seconds. Neither where the request
    is not deterministic.
    """
    settings = services.settings.response_cache
    answering = f"{model.key}@{model.revision}"  # what other weights have answered is no answer of these
    key = cache_key(answering, exchange.route, body, exchange.caller, settings)
    if key is None:
        services.metrics.cache_requests.labels("bypass").inc()
        return None, None
    answer = await services.answers.get(key)
    services.metrics.cache_requests.labels("hit" if answer is not None else "miss").inc()
    return answer, Place(key, ttl, model.key, settings.entry_bytes)


class RecordedStream:
    """A stream's dialect, with what is sent collected on the side."""

    def __init__(self, inner: StreamDialect, limit: int) -> None:
        self._inner = inner
        self.recorder = Recorder(limit)
        self.account: Account = inner.account

    def block(self, block: bytes) -> bytes:
        sent = self._inner.block(block)
        self.recorder.add(sent)
        return sent

    def has_token(self, block: bytes) -> bool:
        return self._inner.has_token(block)

    def end(self) -> bytes:
        last = self._inner.end()
        self.recorder.add(last)
        return last

    def failed(self, error: GatewayError) -> bytes:
        return self._inner.failed(error)
