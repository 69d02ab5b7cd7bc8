"""The end of a gateway: nothing that runs is dropped, and nothing waits for ever.

The process as a person or Kubernetes stops it: a subprocess and a signal. Proves that on SIGTERM /readyz
says so at once, new requests are still served while `shutdownDelay` lasts (with `connection: close`), then
connections are refused, a running stream ends well within `drainTimeout`, and gets one error event after it;
and a large answer whose caller reads slowly is sent whole.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import engine as fake
from engine import DONE, ROLE, FakeEngine, token
from gateway_process import running_process
from http_caller import Caller, ask, get

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_sigterm_serves_on_then_refuses_and_lets_a_stream_finish(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(reply: fake.Reply) -> None:
        await reply.head()
        await reply.chunk(ROLE + token("a"))
        if reply.request.headers["x-request-id"] == "long":
            await release.wait()
        await reply.chunk(token("b") + DONE)
        await reply.end()

    async with (
        FakeEngine(script) as engine,
        running_process(tmp_path, engine, shutdownDelay="700ms", drainTimeout="20s") as gateway,
    ):
        async with await Caller.connect(gateway.port) as caller:
            caller.send("/v1/chat/completions", CHAT, headers={"x-request-id": "long"})
            await caller.head()
            await caller.chunk()
            gateway.signal(signal.SIGTERM)
            await asyncio.sleep(0.2)

            assert (await get(gateway.management, "/readyz")).status == 503
            assert (await get(gateway.management, "/livez")).status == 200
            assert (await get(gateway.port, "/health")).json()["status"] == "draining"
            answer = await ask(gateway.port, "/v1/chat/completions", CHAT)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert answer.body.endswith(DONE)

            await refused(gateway.port)
            assert (await get(gateway.management, "/load")).json()["draining"] is True
            release.set()
            assert b"".join(await caller.chunks()) == token("b") + DONE
        assert await gateway.ended() == 0


async def test_a_stream_that_outlasts_the_drain_gets_one_error_event(tmp_path: Path) -> None:
    script = fake.forever(token("a"), first=[ROLE])
    async with (
        FakeEngine(script) as engine,
        running_process(tmp_path, engine, shutdownDelay="0s", drainTimeout="300ms") as gateway,
    ):
        async with await Caller.connect(gateway.port) as one, await Caller.connect(gateway.port) as other:
            one.send("/v1/chat/completions", CHAT)
            other.send("/chat/stream", {"message": "x"})
            for caller in (one, other):
                await caller.head()
                await caller.chunk()
            gateway.signal(signal.SIGTERM)
            body = b"".join(await one.chunks())
            assert body.endswith(b'"code": "shutting_down", "retry_after": 1}}\n\n' + DONE)
            body = b"".join(await other.chunks())
            assert b'"code": "shutting_down", "retry_after": 1}}\n\ndata: {"done": true' in body
        assert await gateway.ended() == 0
        assert engine.active == 0


async def test_a_slow_reader_of_a_large_answer_gets_all_of_it(tmp_path: Path) -> None:
    size = 16_000_000  # far more than the kernel takes
    async with (
        FakeEngine(fake.answer(200, {"embedding": "0" * size})) as engine,
        running_process(tmp_path, engine, shutdownDelay="0s", drainTimeout="30s") as gateway,
    ):
        async with await Caller.connect(gateway.port, receive_buffer=64 * 1024) as caller:
            caller.send("/v1/embeddings", {"model": "m", "input": "x"})
            head = await caller.head()
            gateway.signal(signal.SIGTERM)
            await refused(gateway.port)
            await asyncio.sleep(1.5)
            body = await caller.reader.readexactly(int(head.headers["content-length"]))
            assert len(body) > size
        assert await gateway.ended() == 0


async def test_ctrl_c_does_not_wait_for_load_balancers_and_twice_does_not_wait_at_all(tmp_path: Path) -> None:
    async with (
        FakeEngine(fake.forever(token("a"), first=[ROLE])) as engine,
        running_process(tmp_path, engine) as gateway,
        await Caller.connect(gateway.port) as caller,
    ):
        caller.send("/v1/chat/completions", CHAT)
        await caller.head()
        gateway.signal(signal.SIGINT)
        await refused(gateway.port)
        assert gateway.process.returncode is None
        gateway.signal(signal.SIGINT)
        await gateway.ended()


async def test_what_is_cut_off_by_the_end_is_in_the_log_too(tmp_path: Path) -> None:
    async with (
        FakeEngine() as engine,
        running_process(tmp_path, engine, drainTimeout="30s") as gateway,
        await Caller.connect(gateway.port) as caller,
    ):
        half = {"content-length": "1000", "x-request-id": "half"}
        caller.send("/v1/chat/completions", b'{"model":', headers=half)
        assert (await ask(gateway.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)
        gateway.signal(signal.SIGINT)
        await refused(gateway.port)
        gateway.signal(signal.SIGINT)
        await gateway.ended()
        (line,) = [line for line in gateway.lines("request") if line["request_id"] == "half"]
        assert line["outcome"] == "client_closed"


async def refused(port: int) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                async with await Caller.connect(port):
                    pass
            except ConnectionRefusedError:
                return
            await asyncio.sleep(0.02)
