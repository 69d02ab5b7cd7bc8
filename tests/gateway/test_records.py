"""Finished requests, which are counted and logged a moment later.

Proves: each is told of once and in order, a few at a time, so that nothing waits for many; however fast they
end, few wait to be told of.
"""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

from http_caller import until

from vllm_gateway.errors import openai_body
from vllm_gateway.policy.room import Room
from vllm_gateway.telemetry import AccessLog, Metrics
from vllm_gateway.web.channel import AsgiChannel
from vllm_gateway.web.exchange import Exchange
from vllm_gateway.web.records import Records

MANY = 1_000
MOST, AT_ONCE, MOST_LINES = 256, 4, 64


class Log(io.StringIO):
    """What is written, and how many lines each time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, text: str) -> int:
        self.sizes.append(text.count("\n"))
        return super().write(text)

    def ids(self) -> list[str]:
        return [json.loads(line)["request_id"] for line in self.getvalue().splitlines()]


def ended(number: int) -> Exchange:
    async def nothing(*_: Any) -> Any: ...

    channel = AsgiChannel(nothing, nothing)
    exchange = Exchange("POST", "/chat", {}, str(number), [], channel, Room(0), openai_body)
    exchange.status = 200
    return exchange


def told(metrics: Metrics) -> float:
    labels = {"model": "unknown", "route": "/chat", "code": "200"}
    return metrics.registry.get_sample_value("vllm_gateway_requests_total", labels) or 0.0


async def test_however_many_end_at_once_few_wait_and_few_are_told_at_once() -> None:
    log, metrics = Log(), Metrics()
    records = Records(metrics, AccessLog(log, level="info", as_json=True))
    for number in range(MANY):
        records.add(ended(number))
        assert number + 1 - told(metrics) <= MOST
    before = told(metrics)
    assert before < MANY, "the last ones wait for a moment"
    while before < MANY:
        await asyncio.sleep(0)
        now = told(metrics)
        assert now - before <= AT_ONCE
        before = now
    await until(lambda: len(log.ids()) == MANY)
    assert log.ids() == [str(number) for number in range(MANY)]
    assert max(log.sizes) <= MOST_LINES
    assert len(log.sizes) <= MANY / MOST_LINES + 1, "each write wakes a thread"


async def test_the_end_tells_of_all_that_wait() -> None:
    log, metrics = Log(), Metrics()
    records = Records(metrics, AccessLog(log, level="info", as_json=True))
    for number in range(MOST - 1):
        records.add(ended(number))
    assert not told(metrics)
    records.flush()
    assert told(metrics) == MOST - 1
    await asyncio.sleep(0.25)  # the timer finds nothing
    assert len(log.ids()) == MOST - 1
