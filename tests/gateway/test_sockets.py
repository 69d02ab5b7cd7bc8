"""What the kernel is told about sockets.

Proves: a connection over which nothing is asked is accepted all the same, a little later, and given up at the
head's time; reading a stream of small events sends about half as many acknowledgements where that was asked
for, and a stream over the gateway does; the kernel's table of descriptors is large from the beginning, as far
as the process may have that many.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest
from engine import DONE, FakeEngine, Reply, token
from http_caller import Caller, until

from vllm_gateway.sockets import acknowledge_less

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
BRIEF = {"limits": {"headerTimeout": "200ms"}}
STREAMS, EVENTS = 20, 16


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
    """Segments that a reader sends while it reads all events, each as it comes. Where this process has to
    wait for the delay of an acknowledgement the kernel sends more until it is asked again.
    """
    reader, writer = pair()
    with reader, writer:
        before = segments(reader, out=True)
        for number in range(STREAMS * EVENTS):
            if less and number % EVENTS == 0:
                acknowledge_less(reader)
            writer.sendall(token("a"))
            reader.recv(4096)
        return segments(reader, out=True) - before


def test_every_second_event_is_acknowledged() -> None:
    assert acknowledgements(less=False) > STREAMS * EVENTS * 0.9
    assert acknowledgements(less=True) < STREAMS * EVENTS * 0.8


async def test_streams_are_read_with_less_acknowledgements(gateway: Any) -> None:
    """As the engine's kernel counts what comes to it. Each event is sent when the one before has arrived."""
    arrived, heard = asyncio.Semaphore(0), 0

    async def script(reply: Reply) -> None:
        nonlocal heard
        sock = reply.writer.get_extra_info("socket")
        await reply.head()
        before = segments(sock, out=False)
        for _ in range(EVENTS):
            await reply.chunk(token("a"))
            await arrived.acquire()
        heard += segments(sock, out=False) - before
        await reply.chunk(DONE)
        await reply.end()

    async with FakeEngine(script) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            for _ in range(STREAMS):
                caller.send("/v1/chat/completions", CHAT)
                await caller.head()
                while await caller.chunk() != DONE:
                    arrived.release()
                await caller.chunk()
        await running.settled()
    assert heard < STREAMS * EVENTS * 0.8


async def test_a_connection_that_asks_nothing_is_given_up(raw_gateway: Any) -> None:
    async with FakeEngine() as engine, raw_gateway(engine, options=BRIEF) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: not running.metric("connections"))


@pytest.mark.parametrize(("may", "has"), [(1024, 1024), (20_000, 16_384)])
def test_the_table_of_descriptors_is_large_at_once(may: int, has: int) -> None:
    code = """if True:
        from pathlib import Path
        from vllm_gateway.sockets import reserve_descriptors
        reserve_descriptors()
        print(len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/status").read_text())
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (may, hard))

    told = subprocess.check_output([sys.executable, "-c", code], text=True, preexec_fn=limit)
    size = re.search(r"FDSize:\s*(\d+)", told)
    assert size is not None
    assert int(size[1]) == has
    assert int(told.split()[0]) == 4, "the descriptor that made it grow is closed"
