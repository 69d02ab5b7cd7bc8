"""What the kernel is told about sockets.

Proves: a connection over which nothing is asked is accepted all the same, a little later, and given up at the
head's time; reading a stream of small events sends about half as many acknowledgements where that was asked
for, and a stream over the gateway does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Any

from engine import DONE, ROLE, FakeEngine, Reply, token
from http_caller import ask, until

from vllm_gateway.sockets import acknowledge_less

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
BRIEF = {"limits": {"headerTimeout": "200ms"}}
EVENTS = 200


def segments(sock: Any, *, out: bool) -> int:
    """tcpi_segs_out or tcpi_segs_in of the kernel's struct tcp_info (linux/tcp.h)."""
    at = 136 if out else 140
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, at + 4)
    return int(struct.unpack_from("=I", info, at)[0])


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = socket.create_connection(listener.getsockname())
        writer, _ = listener.accept()
    writer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


def acknowledgements(*, less: bool) -> int:
    """Segments that a reader sends while it reads so many events, each as it comes."""
    reader, writer = pair()
    with reader, writer:
        if less:
            acknowledge_less(reader)
        before = segments(reader, out=True)
        for _ in range(EVENTS):
            writer.sendall(token("a"))
            reader.recv(4096)
        return segments(reader, out=True) - before


def test_every_second_event_is_acknowledged() -> None:
    assert acknowledgements(less=False) > EVENTS * 0.9
    assert acknowledgements(less=True) < EVENTS * 0.6


async def test_a_stream_is_read_with_less_acknowledgements(gateway: Any) -> None:
    """As the engine's kernel counts what comes to it."""
    heard: list[int] = []

    async def script(reply: Reply) -> None:
        sock = reply.writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await reply.head()
        await reply.chunk(ROLE)
        before = segments(sock, out=False)
        for _ in range(EVENTS):
            await reply.chunk(token("a"))
            await asyncio.sleep(0.002)
        heard.append(segments(sock, out=False) - before)
        await reply.chunk(DONE)
        await reply.end()

    async with FakeEngine(script) as engine, gateway(engine) as running:
        assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)
        await running.settled()
    assert heard[0] < EVENTS * 0.8


async def test_a_connection_that_asks_nothing_is_given_up(raw_gateway: Any) -> None:
    async with FakeEngine() as engine, raw_gateway(engine, options=BRIEF) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        began = time.monotonic()
        await until(lambda: running.metric("connections") > 0)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        print(f"closed after {time.monotonic() - began:.1f} s")
        writer.close()
        await until(lambda: not running.metric("connections"))
