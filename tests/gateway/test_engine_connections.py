"""Connections to engines that are kept and used again, over both channels.

Proves: a request that is sent as its engine closes an idle connection is no failure, however often;
a host that vanished is given up long before the first token's time, and its request tried elsewhere; nothing
is kept of an engine that has gone.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from typing import Any

import engine as fake
from engine import DONE, ROLE, FakeEngine, token
from http_caller import ask, until

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
