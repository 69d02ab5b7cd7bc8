"""What a caller can do wrong in the middle of an answer, and what the engine then gets (FACTS E8 to E10).

Over both channels unless said otherwise. After each, nothing is in flight and no connection is left.
"""

from __future__ import annotations

import asyncio
from typing import Any

import engine as fake
import pytest
from engine import ROLE, FakeEngine, Reply, chat_events, token
from http_caller import Caller, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
UNARY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SIMPLE = {"message": "hi"}
SHORT = {"timeouts": {"firstToken": "200ms", "idle": "200ms", "unary": "300ms", "writeStall": "300ms"}}


@pytest.mark.parametrize("way", ["leave", "reset"])
async def test_e08_a_caller_that_leaves_in_the_middle_frees_the_engine_at_once(
    gateway: Any, way: str
) -> None:
    async with FakeEngine(fake.forever(token("a"), first=[ROLE])) as engine, gateway(engine) as running:
        for path, body in (("/v1/chat/completions", CHAT), ("/chat/stream", SIMPLE)):
            async with await Caller.connect(running.port) as caller:
                caller.send(path, body)
                await caller.head()
                await caller.chunk()
                assert running.in_flight == 1
                getattr(caller, way)()
                await until(lambda: engine.active == 0 and running.in_flight == 0, 1.0)
        await running.settled()
        assert engine.abandoned == 2
        assert running.metric("streams_ended_total", model="m", outcome="client_closed") == 2


async def test_e08_a_caller_that_leaves_before_the_first_byte_frees_the_engine(gateway: Any) -> None:
    async with FakeEngine(fake.never) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await until(lambda: engine.active == 1)
            caller.reset()
            await until(lambda: engine.active == 0, 1.0)
        await running.settled()
        labels = {"model": "m", "route": "/v1/chat/completions", "code": "499"}
        assert running.metric("requests_total", **labels) == 1


async def test_e08_a_caller_that_leaves_just_as_the_head_comes_frees_the_engine(gateway: Any) -> None:
    """The stream has begun, but whoever answers has not had a turn since: it is cancelled before that."""
    callers: list[Caller] = []

    async def script(reply: Reply) -> None:
        callers[-1].reset()
        await asyncio.sleep(0)  # it is done in the next turn of the loop, before the following line
        await reply.head()  # so the gateway hears of both at once
        await reply.until_caller_leaves()

    async with FakeEngine(script) as engine, gateway(engine) as running:
        for number in range(1, 21):
            async with await Caller.connect(running.port) as caller:
                callers.append(caller)
                caller.send("/v1/chat/completions", CHAT)
                await until(lambda: engine.abandoned == number, 1.0)  # noqa: B023 - awaited here
        await running.settled()
        labels = {"model": "m", "route": "/v1/chat/completions"}
        ended = [running.metric("requests_total", **labels, code=code) for code in ("200", "499")]
        assert sum(ended) == 20
        assert running.metric("streams_ended_total", model="m", outcome="client_closed") == ended[0]


async def test_e08_a_caller_that_leaves_while_the_engine_is_silent_in_the_middle_frees_it(
    gateway: Any,
) -> None:
    script = fake.pieces([ROLE, token("a")], then="stall")
    async with FakeEngine(script) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            await caller.chunk()
            caller.leave()
            await until(lambda: engine.active == 0, 1.0)
        await running.settled()


async def test_e09_a_caller_that_never_reads_is_cut_and_little_is_held_for_it(gateway: Any) -> None:
    sent = 0

    async def flood(reply: fake.Reply) -> None:
        nonlocal sent
        await reply.head()
        await reply.chunk(ROLE)
        piece = token("x" * 10_000)
        while True:
            await reply.chunk(piece)
            sent += len(piece)

    async with FakeEngine(flood) as engine, gateway(engine, options=SHORT) as running:
        async with await Caller.connect(running.port, receive_buffer=4096) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            await until(lambda: engine.active == 0 and running.in_flight == 0, 5.0)
        await running.settled()
        # What the kernel's buffers on both connections take (a few MB on loopback), not all that comes.
        assert sent < 32_000_000
        assert running.metric("streams_ended_total", model="m", outcome="write_stall") == 1


async def test_e09_a_caller_that_never_reads_a_large_whole_answer_is_cut(raw_gateway: Any) -> None:
    big = fake.answer(200, {"data": "x" * 20_000_000})
    settings = SHORT | {"timeouts": SHORT["timeouts"] | {"unary": "5s", "writeStall": "100ms"}}
    async with (
        FakeEngine(big) as engine,
        raw_gateway(engine, options=settings) as running,
        await Caller.connect(running.port, receive_buffer=4096) as caller,
    ):
        caller.send("/v1/embeddings", {"model": "m", "input": "x"})
        await caller.head()
        assert running.metric("connections") == 1
        await until(lambda: running.metric("connections") == 0)


async def test_e09_a_slow_reader_gets_everything_and_no_timeout_hits_the_engine(gateway: Any) -> None:
    """Reading pauses for longer than the idle timeout: it is the caller who is slow, not the engine."""
    words = ["x" * 20_000] * 400
    settings = {"timeouts": {"idle": "150ms", "writeStall": "5s"}}
    async with FakeEngine(fake.stream(words)) as engine, gateway(engine, options=settings) as running:
        async with await Caller.connect(running.port, receive_buffer=4096) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            await asyncio.sleep(0.5)
            assert b"".join(await caller.chunks()) == b"".join(chat_events(words, with_usage=False))
        await running.settled()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat"])
async def test_e10_a_caller_that_leaves_a_unary_request_frees_the_engine(gateway: Any, path: str) -> None:
    async with FakeEngine(fake.never) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send(path, UNARY if path.startswith("/v1") else SIMPLE)
            await until(lambda: engine.active == 1)
            caller.leave()
            await until(lambda: engine.active == 0, 1.0)
        await running.settled()
        assert running.metric("requests_total", model="m", route=path, code="499") == 1
