"""What is counted and logged of finished requests: a moment after they ended, those of the moment together.

One by one, between the events of others, it was more than a tenth of what a request cost: its code and its
counts were in no cache of the processor any more (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from vllm_gateway.policy.keys import ANONYMOUS
from vllm_gateway.telemetry import AccessLog, Metrics
from vllm_gateway.web.exchange import CLIENT_CLOSED, Exchange

_DELAY = 0.2  # seconds: nobody who reads metrics or a log sees the difference
_AT_ONCE = 4  # then the loop looks for others, so that no first token waits for all of them
_MOST = 256  # that wait


class Records:
    """The finished requests of the last moment. `flush` tells of them at once, as the process's end must;
    it needs no loop any more.
    """

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._ended: list[Exchange] = []
        self._armed = False

    def add(self, exchange: Exchange) -> None:
        self._ended.append(exchange)
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_later(_DELAY, self._in_time)
        elif len(self._ended) >= _MOST:
            self._tell(_AT_ONCE)

    def _in_time(self) -> None:
        self._tell(_AT_ONCE)
        self._armed = bool(self._ended)
        if self._armed:
            asyncio.get_running_loop().call_soon(self._in_time)
        else:
            self._metrics.settle_gaps()
            self._access_log.flush()

    def flush(self) -> None:
        self._metrics.settle_gaps()
        self._tell(len(self._ended))
        self._access_log.flush()

    def _tell(self, most: int) -> None:
        """Of the oldest, so many."""
        ended = self._ended[:most]
        del self._ended[:most]
        for each in ended:
            self._count(each)
        if ended and self._access_log.on:
            self._access_log.add(_lines(ended, time.time() - time.monotonic()))

    def _count(self, ended: Exchange) -> None:
        metrics, model = self._metrics, ended.model
        metrics.requests.labels(model, ended.route, str(status_of(ended))).inc()
        metrics.duration.labels(model, ended.route).observe(ended.ended_at - ended.started_at)
        metrics.count_tokens(model, ended.caller.name, ended.prompt_tokens, ended.completion_tokens)
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


def _lines(requests: list[Exchange], epoch: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """`epoch` is when the monotonic clock, which is the loop's, was at 0."""
    for ended in requests:
        seconds = round(ended.ended_at - ended.started_at, 4)
        outcome = {"outcome": ended.outcome} if ended.outcome else {}
        fields = fields_of(ended) | {"status": status_of(ended), "seconds": seconds} | outcome
        yield epoch + ended.ended_at, fields
