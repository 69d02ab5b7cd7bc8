"""What is counted and logged of finished requests: a moment after they ended, those of the moment together.

One by one, between the events of others, it was more than a tenth of what a request cost: its code and its
counts were in no cache of the processor any more (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_gateway.policy.keys import ANONYMOUS
from vllm_gateway.telemetry import AccessLog, Metrics
from vllm_gateway.web.exchange import CLIENT_CLOSED, Exchange

_DELAY = 0.05  # seconds: nobody who reads metrics or a log sees the difference
_MOST = 64  # at once, so that nobody waits for them


@dataclass(slots=True)
class Ended:
    """A finished request, without what it held. Times are the loop's."""

    model: str
    route: str
    status: int
    started_at: float
    ended_at: float
    first_token_at: float | None
    stream_outcome: str
    caller: str
    prompt_tokens: int
    completion_tokens: int
    outcome: str
    fields: dict[str, Any]


class Records:
    """The finished requests of the last moment. `flush` tells of them at once, as the process's end must;
    it needs no loop any more.
    """

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._ended: list[Ended] = []
        self._armed = False

    def add(self, exchange: Exchange) -> None:
        self._ended.append(
            Ended(
                exchange.model,
                exchange.route,
                status_of(exchange),
                exchange.started_at,
                exchange.ended_at,
                exchange.first_token_at,
                exchange.stream_outcome,
                exchange.caller.name,
                exchange.prompt_tokens,
                exchange.completion_tokens,
                exchange.outcome,
                fields_of(exchange),
            )
        )
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_later(_DELAY, self._in_time)
        elif len(self._ended) >= _MOST:
            self.flush()

    def _in_time(self) -> None:
        self._armed = False
        self.flush()

    def flush(self) -> None:
        ended, self._ended = self._ended, []
        for each in ended:
            self._count(each)
        if ended and self._access_log.on:
            self._access_log.write(_lines(ended, time.time() - time.monotonic()))

    def _count(self, ended: Ended) -> None:
        metrics, model = self._metrics, ended.model
        metrics.requests.labels(model, ended.route, str(ended.status)).inc()
        metrics.duration.labels(model, ended.route).observe(ended.ended_at - ended.started_at)
        metrics.count_tokens(model, ended.caller, ended.prompt_tokens, ended.completion_tokens)
        if ended.stream_outcome:
            metrics.streams_ended.labels(model, ended.stream_outcome).inc()
        if ended.first_token_at is not None:
            metrics.first_token.labels(model).observe(ended.first_token_at - ended.started_at)


def status_of(exchange: Exchange) -> int:
    """What the caller was answered; nginx's 499 for one that left before that."""
    return exchange.status or CLIENT_CLOSED


def fields_of(exchange: Exchange) -> dict[str, Any]:
    """What every log line about the request has."""
    key = {} if exchange.caller is ANONYMOUS else {"key": exchange.caller.name}
    return key | {
        "request_id": exchange.request_id,
        "method": exchange.method,
        "route": exchange.route,
        "model": exchange.model,
    }


def _lines(requests: list[Ended], epoch: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """`epoch` is when the monotonic clock, which is the loop's, was at 0."""
    for ended in requests:
        seconds = round(ended.ended_at - ended.started_at, 4)
        outcome = {"outcome": ended.outcome} if ended.outcome else {}
        yield epoch + ended.ended_at, ended.fields | {"status": ended.status, "seconds": seconds} | outcome
