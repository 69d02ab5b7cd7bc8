"""The server that rests: it ends when it is told, from whatever thread, and dates its answers anew."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from http_caller import get, until

from vllm_gateway.sockets import bind, port_of
from vllm_gateway.web import resting
from vllm_gateway.web.channel import Receive, Scope, Send
from vllm_gateway.web.health import respond
from vllm_gateway.web.resting import RestingServer


async def app(scope: Scope, _: Receive, send: Send) -> None:
    await respond(scope, send, (200, "text/plain", b"hello"))


class Counting(RestingServer):
    ticks = 0

    async def on_tick(self, counter: int) -> bool:
        self.ticks += 1
        return await super().on_tick(counter)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Counting, int, Callable[[], Awaitable[None]]]]:
    """A server, its port, and what ends when the server has."""
    server = Counting(uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False))
    listener = bind("127.0.0.1", 0)
    ended = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)

    async def end() -> None:
        await asyncio.wait_for(asyncio.shield(ended), 10)

    yield server, port_of(listener), end
    server.should_exit = True
    await end()


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks by itself so seldom that only being told can end it in time."""
    monkeypatch.setattr(resting, "_TICK_SECONDS", 600.0)


@pytest.mark.usefixtures("seldom")
async def test_it_ends_when_another_thread_says_so() -> None:
    async with serving() as (server, _, ended):
        await until(lambda: server.ticks > 0)
        thread = threading.Thread(target=setattr, args=(server, "should_exit", True))
        thread.start()
        await ended()
        thread.join()


async def test_it_ends_when_it_was_told_before_it_began() -> None:
    server = RestingServer(uvicorn.Config(app, lifespan="off", ws="none", log_config=None))
    server.should_exit = True
    await asyncio.wait_for(server.main_loop(), 5)


async def test_answers_are_dated_anew_each_second() -> None:
    async with serving() as (_, port, _):
        first = (await get(port, "/")).headers["date"]

        async def another() -> bool:
            return (await get(port, "/")).headers["date"] != first

        await until(another, 10)


async def test_to_tell_one_that_has_ended_is_no_error() -> None:
    """Its own look may have ended it a moment before."""
    server = RestingServer(uvicorn.Config(app, lifespan="off", ws="none", log_config=None))
    loop = asyncio.new_event_loop()
    server._loop, server._told = loop, asyncio.Event()
    loop.close()
    server.should_exit = True
    assert server.should_exit


@pytest.mark.usefixtures("seldom")
async def test_what_comes_makes_it_look_no_sooner() -> None:
    async with serving() as (server, port, _):
        await until(lambda: server.ticks > 0)
        for _ in range(20):
            await get(port, "/")
        assert server.ticks == 1
