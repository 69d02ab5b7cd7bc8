"""What a caller can do to a gateway's process, at the size that an attacker would choose (E13, E14, E16).

One gateway, as it is shipped, but for `limits.bodyTimeout`. Proves of 10,000 random model names, bodies of
500 MB, with a declared length and in chunks, heads of 5,000 headers, bodies of a byte a second and JSON of
100,000 levels: each gets its 4xx, bodies before they have been sent; no request reaches an engine; the
process is no larger afterwards, nor meanwhile by more than what it may hold; and metrics have one label for
all names. And callers that leave streams at full speed cost no error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import engine as fake
import pytest
from engine import ROLE, FakeEngine, token
from gateway_process import Process, running_process
from http_caller import Answer, Caller, ask, get, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
MIB = 1024 * 1024
BODY = 500_000_000
AT_ONCE = 50
PATH = "/v1/chat/completions"
CHUNKED = {"content-length": "", "transfer-encoding": "chunked"}

Abuse = Callable[[int], Coroutine[Any, Any, None]]


def blocks() -> Iterator[bytes]:
    """A body of 500 MB that nobody has in memory."""
    yield from (b"x" * MIB for _ in range(BODY // MIB))


async def send_body(port: int, headers: dict[str, str], frame: Callable[[bytes], bytes]) -> int:
    """Sends at some 50 MB a second until there is an answer; how much that was."""
    sent = 0
    async with await Caller.connect(port) as caller:
        caller.send(PATH, headers=headers)
        answering = asyncio.ensure_future(caller.answer())
        for block in blocks():
            caller.raw(frame(block))
            sent += len(block)
            with contextlib.suppress(ConnectionError):
                await caller.writer.drain()
            await asyncio.wait((answering,), timeout=0.02)
            if answering.done():
                break
        refused(await answering, 413, "body_too_large")
    return sent


def refused(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.json()["error"]["code"]) == (status, code)


async def names(port: int) -> None:
    async with await Caller.connect(port) as caller:
        for first in range(0, 10_000, AT_ONCE):
            for number in range(first, first + AT_ONCE):
                caller.send(PATH, CHAT | {"model": f"random-{number}"})
            for _ in range(AT_ONCE):
                refused(await caller.answer(), 404, "model_not_found")


async def declared(port: int) -> None:
    assert await send_body(port, {"content-length": str(BODY)}, bytes) < BODY / 2


async def chunked(port: int) -> None:
    for _ in range(3):
        assert await send_body(port, CHUNKED, lambda block: b"%x\r\n%b\r\n" % (len(block), block)) < BODY / 2


async def headers(port: int) -> None:
    wire = b"POST /chat HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 5000 + b"\r\n"
    for _ in range(AT_ONCE):
        async with await Caller.connect(port) as caller:
            caller.raw(wire)
            refused(await caller.answer(), 431, "headers_too_large")


async def trickle(port: int) -> None:
    """A byte a second on each of many connections; the whole body would come in three minutes."""

    async def one() -> None:
        async with await Caller.connect(port) as caller:
            caller.send(PATH, headers={"content-length": "180"})
            answering = asyncio.ensure_future(caller.answer())
            sent = 0
            while not answering.done():
                caller.raw(b" ")
                sent += 1
                await asyncio.wait((answering,), timeout=1.0)
            refused(await answering, 408, "body_too_slow")
            assert 3 <= sent < 30

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


async def depth(port: int) -> None:
    for path, body in ((PATH, b'{"model": "m", "x": '), ("/chat", b'{"message": ')):
        for opening in (b"[", b'{"a":'):
            for _ in range(10):
                refused(await ask(port, path, body + opening * 100_000), 400, "json_too_deep")


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.mark.parametrize(
    ("abuse", "holds"),
    # MiB that may be held meanwhile: a body up to limits.bodyBytes (16), and again where it is put together.
    [(names, 8), (declared, 8), (chunked, 48), (headers, 8), (trickle, 8), (depth, 24)],
    ids=["10,000 names", "500 MB declared", "500 MB in chunks", "5,000 headers", "a byte a second", "depth"],
)
async def test_the_process_stays_as_large_as_it_was(
    tmp_path: Path, engine: FakeEngine, abuse: Abuse, holds: int
) -> None:
    limits = {"bodyTimeout": "4s"}
    async with running_process(tmp_path, engine, limits=limits, logLevel="error") as gateway:
        await warm_up(gateway)
        before = gateway.resident()
        gateway.forget_peak()
        await abuse(gateway.port)
        assert not engine.seen[1:]
        assert gateway.peak() - before < (holds + 8) * MIB
        # The allocator keeps what it likes of what was held, once, however often it was.
        assert gateway.resident() - before < (holds / 2 + 4) * MIB
        assert await models_in_metrics(gateway) <= {"m", "unknown"}


async def warm_up(gateway: Process) -> None:
    """What one request costs for good is not what many cost: code, and the heap that one large body took."""
    large = b"%x\r\n%b\r\n" % (17 * MIB, b"x" * (17 * MIB))
    refused(await ask(gateway.port, PATH, large, headers=CHUNKED), 413, "body_too_large")
    assert (await ask(gateway.port, PATH, CHAT)).status == 200
    assert (await ask(gateway.port, PATH, CHAT | {"model": "x"})).status == 404
    assert (await get(gateway.port, "/models")).status == 200
    await models_in_metrics(gateway)


async def models_in_metrics(gateway: Process) -> set[str]:
    text = (await get(gateway.management, "/metrics")).body.decode()
    lines = (line for line in text.splitlines() if 'model="' in line)
    return {line.split('model="', 1)[1].split('"', 1)[0] for line in lines}


async def test_callers_that_leave_fast_streams_cost_no_error(tmp_path: Path) -> None:
    """Tokens that come between a connection's end and its owner's turn have nobody to go to."""
    script = fake.forever(token("a"), first=[ROLE], every=0.0005)

    async def leave(port: int) -> None:
        for number in range(20):
            async with await Caller.connect(port) as caller:
                caller.send(PATH, CHAT | {"stream": True})
                async with asyncio.timeout(10):
                    await caller.reader.readuntil(b'"a"')
                await asyncio.sleep(0.02 + number / 1000)
                caller.writer.transport.abort()

    async with FakeEngine(script) as engine, running_process(tmp_path, engine) as process:
        await asyncio.gather(*(leave(process.port) for _ in range(8)))
        await until(lambda: engine.active == 0)
        assert "exception" not in process.log.read_text()
