"""Connections to engines that are kept and used again, over both channels.

Proves: a request that is sent as its engine closes an idle connection is no failure, however often; a host
that vanished is given up long before the first token's time, and its request tried elsewhere; nothing is kept
of an engine that has gone. Idle connections are left alone when a static backend is asked for its models, and
by a request that was sent elsewhere first; where one of them was closed under a request, those that have been
idle for as long are not used either, and those that are newer are.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import socket
import struct
from typing import Any

import engine as fake
from engine import DONE, ROLE, FakeEngine, token
from http_caller import Caller, ask, until

from vllm_gateway.routing.table import Endpoint, Model, Table
from vllm_gateway.upstream.client import Client

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_e07_the_race_is_no_failure_however_often_it_is_lost(gateway: Any) -> None:
    """A quiet gateway's requests come as far apart as its engine keeps connections (5 s of vLLM's own)."""
    served: list[Any] = []

    async def script(reply: fake.Reply) -> None:
        if reply.writer in served:
            reply.close()
            return
        served.append(reply.writer)
        await fake.stream()(reply)

    async with FakeEngine(script) as engine, gateway(engine) as running:
        for _ in range(30):
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)
        assert running.metric("retries_total") > 20  # more than is left of any budget


def vanish(sock: Any) -> None:
    """As if its host had: the kernel drops whatever comes for the socket (SO_ATTACH_FILTER: return 0)."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", 1, ctypes.addressof(drop)))


async def test_e05_a_host_that_vanished_is_given_up_long_before_the_first_token(gateway: Any) -> None:
    """Its node lost power, say: nobody ever hears again of a request on a connection that it had."""

    async def script(reply: fake.Reply) -> None:
        await fake.stream()(reply)
        if len(engine.seen) == 1:
            vanish(reply.writer.get_extra_info("socket"))

    async with FakeEngine(script) as engine, gateway(engine, options={"refreshInterval": "1h"}) as running:
        client = running.gateway.client
        client.close()  # discovery's connection, which has the time that ships
        client._unheard = 0.5
        async with asyncio.timeout(10):
            for _ in range(2):
                assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)
        assert running.metric("upstream_errors_total", model="m", reason="closed_early") == 1


async def test_nothing_is_kept_of_an_engine_whose_last_connection_broke(gateway: Any) -> None:
    """Pods come and go for months."""
    broken = fake.pieces([ROLE, token("a")], then="reset")
    options = {"timeouts": {"upstreamKeepAlive": "100ms"}}
    async with (
        FakeEngine(fake.in_turn(fake.stream(), broken)) as engine,
        gateway(engine, options=options | {"refreshInterval": "1h"}) as running,
    ):
        for _ in range(2):
            await ask(running.port, "/v1/chat/completions", CHAT)
        await until(lambda: not running.gateway.client._idle)


class Together:
    """An engine's script: answers once `size` requests are there, so that each has its own connection."""

    def __init__(self, size: int) -> None:
        self._size, self._there = size, asyncio.Event()
        self._seen = 0

    async def __call__(self, reply: fake.Reply) -> None:
        self._seen += 1
        if self._seen == self._size:
            self._there.set()
        await self._there.wait()
        await fake.stream()(reply)


async def many(running: Any, times: int) -> None:
    answers = await asyncio.gather(*(ask(running.port, "/v1/chat/completions", CHAT) for _ in range(times)))
    assert all(answer.body.endswith(DONE) for answer in answers)
    await running.settled()


async def test_asking_a_backend_for_its_models_leaves_its_idle_connections_alone(gateway: Any) -> None:
    async with (
        FakeEngine(Together(8)) as engine,
        gateway(engine, options={"refreshInterval": "60ms"}) as running,
    ):
        await many(running, 8)
        accepted = engine.accepted
        await until(lambda: engine.accepted > accepted + 2)  # it has been asked since then
        assert running.gateway.client.idle_count == 8
        asked = running.gateway.client.idle_count
        engine.script = Together(8)
        await many(running, 8)
        assert running.gateway.client.idle_count == asked
        assert running.metric("upstream_errors_total", model="m", reason="closed_early") == 0


async def test_a_request_that_is_tried_elsewhere_leaves_the_idle_connections_there_alone(
    gateway: Any,
) -> None:
    async with (
        FakeEngine(fake.answer(503, {"error": {"message": "full"}})) as full,
        FakeEngine(Together(4)) as other,
        gateway(other, options={"refreshInterval": "1h"}) as running,
    ):
        ends = {end: Endpoint(f"{end.port}", "127.0.0.1", end.port) for end in (full, other)}
        running.gateway.holder.put(Table.of([Model("m", "m", endpoints=(ends[other],))]))
        await many(running, 4)
        running.gateway.holder.put(Table.of([Model("m", "m", endpoints=(ends[full], ends[other]))]))
        other.script = fake.stream()
        async with asyncio.timeout(10):
            while not full.seen:
                await many(running, 1)
        assert other.connections >= 4


def have(connections: list[Any], number: int) -> bool:
    return len(connections) == number


def are_idle(client: Client, number: int) -> bool:
    return client.idle_count == number


async def test_a_lost_race_costs_the_connections_that_were_idle_as_long_and_no_newer_ones(
    gateway: Any,
) -> None:
    """Each request says which connection it is on: the engine closes the one that it is told to."""
    gates = [asyncio.Event() for _ in range(4)]
    connections: list[Any] = []

    async def script(reply: fake.Reply) -> None:
        if reply.writer not in connections:
            connections.append(reply.writer)
            await gates[len(connections) - 1].wait()
        elif reply.request.headers["x-request-id"] == "race":
            await gates[3].wait()
            reply.close()
            return
        await fake.stream()(reply)

    async with (
        FakeEngine(script) as engine,
        gateway(engine, options={"refreshInterval": "1h"}) as running,
    ):
        client = running.gateway.client
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(await Caller.connect(running.port)) for _ in range(4)]
            for number, caller in enumerate(callers[:3]):
                caller.send("/v1/chat/completions", CHAT)
                await until(functools.partial(have, connections, number + 1))
            for number in (0, 1):  # the first has been idle for longer than the second
                gates[number].set()
                await callers[number].answer()
                await until(functools.partial(are_idle, client, number + 1))
            callers[3].send("/v1/chat/completions", CHAT, headers={"x-request-id": "race"})
            await until(lambda: client.idle_count == 1)
            gates[2].set()  # comes back while the race is being lost
            await callers[2].answer()
            await until(lambda: client.idle_count == 2)
            gates[3].set()
            assert (await callers[3].answer()).body.endswith(DONE)
        await running.settled()
        assert client.idle_count == 2  # that of the third request, and the one made for the fourth
        assert not connections[2].is_closing()
        assert len(connections) == 4
