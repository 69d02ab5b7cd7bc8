"""Large requests and answers together (limits.heldBytes): what they may take of the memory of the streams.

Proves: where there is no room a large request gets a 503 with Retry-After while small ones are served; room
is counted as bodies come, and comes back when an engine has answered, when a caller leaves and when a body is
refused; whole answers take room as well; and a stream that has begun holds no body, by the process's size.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import engine as fake
from engine import DONE, ROLE, FakeEngine, token
from gateway_process import running_process
from http_caller import Answer, Caller, ask, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
MIB = 1024 * 1024

HELD = {"limits": {"heldBytes": MIB}}
LARGE = CHAT | {"messages": [{"role": "user", "content": "x" * 400_000}]}


def is_full(answer: Answer) -> None:
    assert (answer.status, answer.json()["error"]["code"]) == (503, "gateway_full")
    assert answer.headers["retry-after"] == "2"


async def test_large_bodies_that_wait_leave_room_for_small_ones_and_for_the_streams(gateway: Any) -> None:
    async with FakeEngine(fake.never) as engine, gateway(engine, options=HELD) as running:
        async with await Caller.connect(running.port) as one, await Caller.connect(running.port) as two:
            one.send("/v1/chat/completions", LARGE)
            two.send("/v1/chat/completions", LARGE)
            await until(lambda: engine.active == 2)
            is_full(await ask(running.port, "/v1/chat/completions", LARGE))
            assert running.metric("refusals_total", code="gateway_full") == 1
            engine.script = fake.stream()
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).status == 200
        await until(lambda: engine.active == 0)
        assert (await ask(running.port, "/v1/chat/completions", LARGE)).status == 200
        await running.settled()


async def test_a_body_is_counted_as_it_comes_and_given_back_if_it_never_does(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=HELD) as running:
        room = running.gateway.services.room
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", headers={"content-length": "900000"})
            caller.raw(b" " * 300_000)
            await until(lambda: room.taken() == 300_000)
            caller.raw(b" " * 300_000)
            await until(lambda: room.taken() == 600_000)
            is_full(await ask(running.port, "/v1/chat/completions", b" " * 500_000))
        await running.settled()
        assert not engine.seen


async def test_whole_answers_take_room_too_and_streams_go_on(gateway: Any) -> None:
    script = fake.in_turn(
        fake.forever(token("a"), first=[ROLE], every=0.01), fake.answer(200, {"x": "y" * MIB})
    )
    async with FakeEngine(script) as engine, gateway(engine, options=HELD) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            is_full(await ask(running.port, "/v1/embeddings", {"model": "m", "input": "x"}))
            assert await caller.chunk()
        await running.settled()


async def test_a_body_that_is_too_large_gives_back_what_it_took(gateway: Any) -> None:
    limits = {"limits": {"heldBytes": MIB, "bodyBytes": 300_000}}
    chunked = {"content-length": "", "transfer-encoding": "chunked"}
    async with FakeEngine() as engine, gateway(engine, options=limits) as running:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (400_000, b" " * 400_000)
        assert (await ask(running.port, "/v1/chat/completions", body, headers=chunked)).status == 413
        await running.settled()


async def test_streams_that_have_begun_hold_no_body(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def held(reply: fake.Reply) -> None:
        await reply.head()
        await reply.chunk(ROLE + token("a"))
        await gate.wait()
        await reply.chunk(DONE)
        await reply.end()

    large = CHAT | {"messages": [{"role": "user", "content": "x" * (4 * MIB)}]}
    sizes = []
    async with FakeEngine(held) as engine, running_process(tmp_path, engine, logLevel="error") as gateway:
        callers = [await Caller.connect(gateway.port) for _ in range(20)]
        for caller in callers:
            caller.send("/v1/chat/completions", large)
            await caller.head()
            sizes.append(gateway.resident())
        gate.set()
        for caller in callers:
            assert b"[DONE]" in b"".join(await caller.chunks())
            caller.leave()
    assert sizes[-1] - sizes[3] < 16 * MIB  # sixteen bodies of four
