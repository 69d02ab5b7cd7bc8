"""The watch over a caller for whom much waits (E9).

Proves: who reads nothing is cut after the time, and no later; who reads a little now and then is not, however
long it takes; crumbs are no reading, and what is written meanwhile is no step back; after `stop` nothing is
looked at; what the kernel holds is counted, and time in which the process stood still is not. Of a gateway:
a steady but slow reader of a large whole answer, and of a stream, gets all of it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import engine as fake
import pytest
from engine import FakeEngine
from http_caller import Caller, until
from virtual_loop import VirtualLoop

from vllm_gateway.web.stall import LEAST_READ, StallWatch, unread_bytes

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Watched:
    """A caller with `unread` bytes, watched for 8 seconds without progress."""

    def __init__(self, loop: VirtualLoop, unread: int = 1_000_000) -> None:
        self._began = loop.now
        self._loop = loop
        self.unread = unread
        self.cut_after: float | None = None
        self.watch = StallWatch(loop, 8.0, lambda: self.unread, self._cut)

    def _cut(self) -> None:
        self.cut_after = self._loop.now - self._began

    def live(self, seconds: int, *, reads: int) -> None:
        for _ in range(seconds):
            self.unread -= reads
            self._loop.advance(1.0)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
    loop.close()


def test_who_reads_nothing_is_cut_after_the_time(loop: VirtualLoop) -> None:
    caller = Watched(loop)
    caller.live(7, reads=0)
    assert caller.cut_after is None
    caller.live(5, reads=0)
    assert caller.cut_after == 8.0


def test_who_stops_reading_is_cut_soon_after_the_time(loop: VirtualLoop) -> None:
    caller = Watched(loop)
    caller.live(9, reads=LEAST_READ)
    caller.live(12, reads=0)
    assert caller.cut_after is not None
    assert 17.0 <= caller.cut_after <= 9.0 + 8.0 * 1.25


def test_a_steady_reader_is_let_go_on(loop: VirtualLoop) -> None:
    caller = Watched(loop, 100_000_000)
    caller.live(1000, reads=LEAST_READ // 4)
    assert caller.cut_after is None
    caller.watch.stop()
    caller.live(100, reads=0)
    assert caller.cut_after is None


def test_crumbs_are_no_reading(loop: VirtualLoop) -> None:
    caller = Watched(loop)
    caller.live(20, reads=LEAST_READ // 16)
    assert caller.cut_after == 8.0


def test_time_in_which_the_process_stood_still_does_not_count(loop: VirtualLoop) -> None:
    """Nobody could read then: what there was to read did not come."""
    caller = Watched(loop)
    caller.live(5, reads=0)
    loop.now += 60.0
    loop.settle()
    assert caller.cut_after is None
    caller.live(1, reads=LEAST_READ)
    loop.now += 60.0
    caller.live(7, reads=0)
    assert caller.cut_after is None
    caller.live(5, reads=0)
    assert caller.cut_after is not None


def test_what_is_written_meanwhile_is_no_step_back(loop: VirtualLoop) -> None:
    caller = Watched(loop)
    caller.live(2, reads=LEAST_READ)
    caller.unread += 500_000
    caller.live(30, reads=LEAST_READ // 2)
    assert caller.cut_after is None
    caller.watch.stop()


async def test_what_the_kernel_holds_is_unread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    try:
        assert unread_bytes(transport) == 0
        transport.write(b"x" * 30_000_000)
        await until(lambda: 0 < transport.get_write_buffer_size() < 30_000_000)
        waiting = unread_bytes(transport)
        assert transport.get_write_buffer_size() < waiting < 30_000_000
        for _ in range(10):
            await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
        await until(lambda: unread_bytes(transport) < waiting - 1_000_000)
    finally:
        transport.abort()
        theirs.close()


async def until_end(caller: Caller) -> None:
    """Reads to the last chunk, of size 0."""
    end, tail = b"\r\n0\r\n\r\n", b""
    async with asyncio.timeout(20):
        while not tail.endswith(end):
            tail = (tail + await caller.reader.read(1 << 20))[-len(end) :]


async def _read_slowly(caller: Caller, seconds: float, pause: float = 0.016) -> int:
    """64 KiB after each pause, so some 4 MB a second, for `seconds`."""
    loop, read = asyncio.get_running_loop(), 0
    until_then = loop.time() + seconds
    while loop.time() < until_then:
        piece = await caller.reader.read(65536)
        assert piece, f"cut after {read} bytes"
        read += len(piece)
        await asyncio.sleep(pause)
    return read


async def test_e09_a_steady_but_slow_reader_of_a_large_whole_answer_is_not_cut(raw_gateway: Any) -> None:
    """For longer than writeStall, and the second that streams have before it, its connection stays full."""
    body = json.dumps({"data": "x" * 30_000_000}, separators=(",", ":")).encode()
    settings = {"timeouts": {"writeStall": "100ms"}}
    async with (
        FakeEngine(fake.answer(200, {"data": "x" * 30_000_000})) as engine,
        raw_gateway(engine, options=settings) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/embeddings", {"model": "m", "input": "x"})
        head = await caller.head()
        read = await _read_slowly(caller, 2.5)
        rest = await caller.reader.readexactly(int(head.headers["content-length"]) - read)
        assert read + len(rest) == len(body)
        assert rest.endswith(b'x"}')


async def test_e09_a_steady_but_slow_reader_of_a_stream_is_not_cut(raw_gateway: Any) -> None:
    """The kernel takes more only when a third of its megabytes is free: what it holds counts as unread."""
    words = ["x" * 50_000] * 600
    settings = {"timeouts": {"writeStall": "500ms"}}
    async with FakeEngine(fake.stream(words)) as engine, raw_gateway(engine, options=settings) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            await _read_slowly(caller, 4.0, pause=0.03)
            await until_end(caller)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1
