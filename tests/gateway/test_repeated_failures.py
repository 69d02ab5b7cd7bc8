"""Ten thousand cheap failures in one process, of every kind of FACTS E1 to E17 that takes no wait.

Proves: neither objects nor blocks of memory pile up, nor metrics' labels; in the end no request is in flight,
no permit is out, and no connection to the engine is left but those of the pool.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from typing import Any

import engine as fake
import pytest
from engine import DONE, ENGINE_DIED, ROLE, FakeEngine, Reply, token
from http_caller import Caller, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
AT_ONCE = 20
# By what a request names: what the engine does.
SCRIPTS = {
    "E1 reset in the middle": fake.pieces([ROLE, token("a"), b'data: {"half'], then="reset"),
    "E1 closed in the middle": fake.pieces([ROLE, token("a")], then="close"),
    "E2 error in band": fake.pieces([ROLE, ENGINE_DIED, DONE]),
    "E6 500 of a draining engine": fake.answer(500, {"detail": "cannot schedule new futures after shutdown"}),
    "E7 closed without an answer": fake.raw([]),
    "E8 caller leaves": fake.forever(token("a"), first=[ROLE]),
    "E11 full": fake.answer(503, {"error": {"message": "full", "type": "Service Unavailable"}}),
    "E12 the caller's mistake": fake.answer(400, {"error": {"message": "too long"}}),
    "E17 no chunk": fake.raw([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"]),
}
# What never reaches an engine.
REFUSED = (
    b'{"model":',  # E13
    b'{"model":"m","x":' + b"[" * 1000,
    b'{"model":"random-%d"}',  # E16
)


async def scripted(reply: Reply) -> None:
    await SCRIPTS[reply.request.json()["user"]](reply)


async def fail(port: int, number: int) -> None:
    """One request that an engine or its caller breaks off."""
    kind = list(SCRIPTS)[number % len(SCRIPTS)]
    async with await Caller.connect(port) as caller:
        caller.send("/v1/chat/completions" if number % 2 else "/v1/completions", CHAT | {"user": kind})
        head = await caller.head()
        if head.headers.get("transfer-encoding") == "chunked":
            await caller.chunk()


async def refuse(port: int, times: int) -> None:
    """So many requests that never reach an engine, pipelined on one connection."""
    async with await Caller.connect(port) as caller:
        for number in range(0, times, AT_ONCE):
            for each in range(number, number + AT_ONCE):
                body = REFUSED[each % len(REFUSED)].replace(b"%d", b"%d" % each)
                caller.send("/v1/chat/completions", body)
            for _ in range(AT_ONCE):
                assert (await caller.answer()).status in (400, 404)


async def repeat(port: int, failures: int, refusals: int) -> None:
    async def worker(first: int) -> None:
        for number in range(first, failures, AT_ONCE):
            await fail(port, number)

    await asyncio.gather(refuse(port, refusals), *(worker(first) for first in range(AT_ONCE)))


async def test_ten_thousand_failures_leave_memory_flat(
    raw_gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "vllm_gateway")  # pytest would keep each warning
    async with FakeEngine(scripted) as engine, raw_gateway(engine) as running:

        async def held() -> tuple[int, int]:
            await running.settled()
            await until(lambda: engine.active == 0, 30.0)
            running.gateway.client.close()  # how many idle ones there are depends on the machine's speed
            await until(lambda: engine.connections == 0, 30.0)
            engine.seen.clear()
            running.gateway.services.records.flush()  # the last ones wait for a moment to be told
            gc.collect()
            return len(gc.get_objects()), sys.getallocatedblocks()

        await repeat(running.port, 300, 300)
        objects, blocks = await held()
        await repeat(running.port, 1_000, 9_000)
        more_objects, more_blocks = await held()
        assert more_objects - objects < 500
        assert more_blocks - blocks < 2_000
        assert running.permits == running.in_flight == 0
        samples = [one for found in running.gateway.metrics.registry.collect() for one in found.samples]
        models = {sample.labels["model"] for sample in samples if "model" in sample.labels}
        assert models == {"m", "unknown"}, "some 3,000 model names that nobody serves are one label"
