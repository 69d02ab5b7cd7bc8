"""What one connection may make the gateway hold: requests that wait for their turn, and bodies nobody reads.

Proves: many requests at once are all answered, too many end the connection; a body that an answer did not
need is let go with it, and one in small pieces arrives whole; an absolute target is the same route, for
HTTP/1.0 too.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from engine import DONE, FakeEngine
from http_caller import Caller, ask, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
NOWHERE = b"GET /nowhere HTTP/1.1\r\n\r\n"


def waiting(running: Any) -> int:
    return sum(len(each._pipeline or ()) for each in running.server.server_state.connections)


async def test_many_requests_at_once_are_all_answered(raw_gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        for _ in range(3):
            caller.raw(NOWHERE * 900)
            for _ in range(900):
                assert (await caller.answer()).status == 404
        assert waiting(running) == 0


async def test_too_many_requests_at_once_end_the_connection(raw_gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.raw(NOWHERE * 50_000)
        answered = b""
        with contextlib.suppress(ConnectionResetError):
            while data := await caller.reader.read(65536):
                answered += data
        assert answered.count(b"HTTP/1.1 404") < 2000
        assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/nowhere")])
async def test_a_body_that_nobody_read_is_let_go_with_the_answer(
    raw_gateway: Any, method: str, path: str
) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send(path, b"x" * 200_000, method=method)
        await caller.answer()
        (connection,) = running.server.server_state.connections
        await until(lambda: not connection._newest.body)


async def test_a_body_in_small_chunks_arrives_whole(gateway: Any) -> None:
    body = json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunks = b"".join(b"3\r\n%b\r\n" % body[at : at + 3] for at in range(0, len(body) // 3 * 3, 3))
    rest = body[len(body) // 3 * 3 :]
    last = b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b""
    async with (
        FakeEngine() as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks + last + b"0\r\n\r\n")
        assert (await caller.answer()).body.endswith(DONE)
        assert engine.seen[0].json()["messages"] == CHAT["messages"]


@pytest.mark.parametrize("target", ["/v1/chat/completions", "http://t/v1/chat/completions?x=1"])
async def test_an_absolute_target_is_the_same_route(raw_gateway: Any, target: str) -> None:
    async with FakeEngine() as engine, raw_gateway(engine) as running:
        answer = await ask(running.port, target, CHAT, version="1.0")
        assert answer.body.endswith(DONE)
        assert "transfer-encoding" not in answer.headers
