"""The traps of writing below ASGI on uvicorn 0.54, and what plain HTTP clients may do.

Proves: pipelined requests are answered in order and never into each other; HTTP/1.0 gets an unframed body;
HEAD gets no body; `connection: close` is honoured; a task that is cancelled writes no second head; a caller
that pipelined and then left frees its engine; an offer of h2c does no harm; bytes that are no
request end the one before them with a 400, once, and its engine is freed; an idle
connection is closed after its time and no sooner, whatever came on it that is no request; a target in another
form leads to the same route; what follows a connection's last request does not touch its answer; a connection
that has ended is gone without the garbage collector.
"""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import engine as fake
import pytest
from engine import DONE, ROLE, FakeEngine, Reply, chat_events, event, token
from http_caller import Caller, ask, get, until

from vllm_gateway.web.protocol import GatewayProtocol
from vllm_gateway.web.turn import Turn

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
UNARY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = b"".join(chat_events(["Hel", "lo", "!"], with_usage=False))


async def test_a_request_pipelined_during_a_stream_is_answered_after_it(gateway: Any) -> None:
    async with FakeEngine(fake.stream(delay=0.02)) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT, headers={"x-request-id": "one"})
            caller.send("/v1/chat/completions", UNARY, headers={"x-request-id": "two"})
            caller.send("/health", method="GET", headers={"x-request-id": "three"})
            caller.send("/chat/stream", {"message": "x"}, headers={"x-request-id": "four"})
            answers = [await caller.answer() for _ in range(4)]
        assert [answer.headers["x-request-id"] for answer in answers] == ["one", "two", "three", "four"]
        assert answers[0].body == WHOLE
        assert answers[1].json()["choices"][0]["message"]["content"] == "Hello!"
        assert answers[3].body.endswith(b"}\n\n")
        await running.settled()


async def test_a_caller_that_pipelines_during_a_stream_and_leaves_frees_the_engine(gateway: Any) -> None:
    script = fake.forever(token("a"), first=[ROLE], every=0.005)
    async with FakeEngine(script) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            caller.send("/v1/chat/completions", CHAT)
            await caller.chunk()
            caller.reset()
            await until(lambda: engine.active == 0 and not running.in_flight)
        await running.settled()
        assert len(engine.seen) == 1


async def test_many_small_streams_pipelined_at_once(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            for _ in range(20):
                caller.send("/v1/chat/completions", CHAT)
            assert {(await caller.answer()).body for _ in range(20)} == {WHOLE}
        await running.settled()


async def test_an_http_1_0_caller_gets_the_bare_events_and_the_end_of_the_connection(
    raw_gateway: Any,
) -> None:
    async with FakeEngine() as engine, raw_gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT, version="1.0")
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == WHOLE
        answer = await ask(running.port, "/chat", {"message": "x"}, version="1.0")
        assert answer.json()["response"] == "Hello!"


async def test_connection_close_is_honoured(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        for path, body in (("/v1/chat/completions", CHAT), ("/chat", {"message": "x"})):
            async with await Caller.connect(running.port) as caller:
                caller.send(path, body, headers={"connection": "close"})
                answer = await caller.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert await asyncio.wait_for(caller.reader.read(), 2) == b""


async def test_head_has_the_heads_of_get_and_no_body(gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        for path in ("/health", "/models", "/v1/models", "/v1/models/m"):
            caller.send(path, method="HEAD")
            head = await caller.head()
            assert head.status == 200
            assert int(head.headers["content-length"]) > 0
        caller.send("/chat/stream", method="HEAD")
        head = await caller.head()
        assert head.status == 405


async def test_an_offer_of_h2c_is_ignored(raw_gateway: Any) -> None:
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQ"}
    async with FakeEngine() as engine, raw_gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT, headers=offer)
        assert answer.body == WHOLE


async def test_expect_100_continue_is_answered_before_the_body(gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/chat", headers={"content-length": "16", "expect": "100-continue"})
        assert (await caller.head()).status == 100
        caller.raw(b'{"message": "x"}')
        assert (await caller.answer()).status == 200


async def test_a_large_body_that_arrives_in_pieces_reaches_the_engine_unchanged(gateway: Any) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"x" * 3_000_000)
    async with FakeEngine() as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", headers={"content-length": str(len(body))})
            for at in range(0, len(body), 700_000):
                caller.raw(body[at : at + 700_000])
                await asyncio.sleep(0.005)
            assert (await caller.answer()).status == 200
        assert engine.seen[0].body == body


async def test_a_stream_that_is_cancelled_before_its_head_is_out_gets_one_head(gateway: Any) -> None:
    """The drain's deadline cancels a request that still waits for its engine."""
    async with (
        FakeEngine(fake.never) as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", CHAT)
        await until(lambda: engine.active == 1)
        for task in list(running.server.server_state.tasks):
            task.cancel()
        answer = await caller.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "shutting_down")
        await until(lambda: engine.active == 0)


async def test_a_stream_that_is_cancelled_in_the_middle_gets_one_error_event_and_no_second_head(
    gateway: Any,
) -> None:
    script = fake.forever(token("a"), first=[ROLE])
    async with FakeEngine(script) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            await caller.chunk()
            for task in list(running.server.server_state.tasks):
                task.cancel()
            body = b"".join(await caller.chunks())
            assert body.endswith(b'"code": "shutting_down", "retry_after": 1}}\n\n' + DONE)
            assert b"HTTP/1.1" not in body
            await until(lambda: engine.active == 0)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="draining") == 1


async def test_a_caller_with_a_keep_alive_connection_can_come_back_after_an_error(gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        for body, status in ((b"{", 400), (CHAT | {"model": "x"}, 404), (CHAT, 200)):
            caller.send("/v1/chat/completions", body)
            assert (await caller.answer()).status == status


async def test_ipv6_is_written_with_brackets(raw_gateway: Any) -> None:
    from vllm_gateway.routing.pick import Hint
    from vllm_gateway.routing.table import Endpoint
    from vllm_gateway.upstream.attempt import Call, request_bytes

    call = Call("m", "/x", lambda _: b"", {}, "id", 1.0, first_token=False, hint=Hint())
    assert b"host: [fd00::1]:8000\r\n" in request_bytes(call, Endpoint("u", "fd00::1", 8000), b"", None)


async def test_get_routes_pass_cors_and_request_id(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await get(running.port, "/models", origin="https://a.example", x_request_id="r1")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["x-request-id"] == "r1"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat", "/chat/stream"])
async def test_head_on_a_route_of_post_has_no_body(gateway: Any, path: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send(path, method="HEAD")
            caller.writer.write_eof()
            said = await caller.reader.read()
        assert said.startswith(b"HTTP/1.1 405 ")
        assert said.endswith(b"\r\n\r\n")


async def test_a_connection_that_a_slow_caller_paused_is_read_again(raw_gateway: Any) -> None:
    """Whatever the size of the stream: the last read may pause the engine's connection and end its answer."""
    sizes = iter(range(40, 900, 40))

    async def script(reply: Reply) -> None:
        await reply.head()
        await reply.chunk(
            event({"choices": [{"index": 0, "delta": {"content": "x" * 4000}}]}) * next(sizes, 1)
        )
        await reply.chunk(DONE)
        await reply.end()

    async with FakeEngine(script) as engine, raw_gateway(engine) as running:
        for _ in range(10):
            async with await Caller.connect(running.port, receive_buffer=4096) as slow:
                slow.send("/v1/chat/completions", CHAT)
                await asyncio.sleep(0.05)
                await slow.answer()
            await running.settled()
            idle = [entry for found in running.gateway.client._idle.values() for entry in found]
            assert not [entry for entry in idle if entry._paused]


@pytest.mark.parametrize("expect", ["", "100-continue"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/nowhere"])
async def test_what_follows_a_body_and_is_no_request_is_a_400(
    raw_gateway: Any, path: str, expect: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps(CHAT).encode()
    async with (
        FakeEngine(fake.stream(delay=0.02)) as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        headers = {"content-length": str(len(body)), "expect": expect}
        caller.send(path, body + b"\0garbage\r\n\r\n", headers=headers)
        assert (await caller.answer()).status == 400
        assert await asyncio.wait_for(caller.reader.read(), 3) == b""
        await running.settled()
        assert not engine.seen
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_what_follows_a_request_that_waits_for_its_engine_frees_the_engine(
    raw_gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        FakeEngine(fake.never) as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", CHAT)
        await until(lambda: engine.active == 1)
        caller.raw(b"\0garbage\r\n\r\n")
        assert (await caller.answer()).status == 400
        await until(lambda: engine.active == 0, 0.5)  # not when the connection is closed, a second later
        assert await asyncio.wait_for(caller.reader.read(), 3) == b""
        await running.settled()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


EARLY = b"OPTIONS /chat HTTP/1.1\r\nhost: t\r\norigin: x\r\naccess-control-request-method: POST\r\n"


@pytest.mark.parametrize("rest", [b"\r\n", b"body"], ids=["an empty line", "the body after its answer"])
async def test_an_idle_connection_is_closed_though_something_came_on_it(
    raw_gateway: Any, rest: bytes
) -> None:
    options = {"timeouts": {"keepAlive": "1s"}}
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=options) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.raw(EARLY + b"content-length: %d\r\n\r\n" % (4 if rest == b"body" else 0))
        assert (await caller.head()).status == 204
        caller.raw(rest)
        assert await asyncio.wait_for(caller.reader.read(), 5) == b""


async def test_a_keep_alive_of_less_than_a_second_is_not_none(raw_gateway: Any) -> None:
    options = {"timeouts": {"keepAlive": "900ms"}}
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=options) as running,
        await Caller.connect(running.port) as caller,
    ):
        for _ in range(2):
            caller.send("/v1/chat/completions", UNARY)
            assert (await caller.answer()).status == 200
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("path", ["/v1/chat/completions?beta=true", "http://t/v1/chat/completions"])
async def test_a_target_in_another_form_leads_to_the_same_route(gateway: Any, path: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        assert (await ask(running.port, path, CHAT)).body == WHOLE
        await running.settled()
        labels = {"model": "m", "route": "/v1/chat/completions", "code": "200"}
        assert running.metric("requests_total", **labels) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health"])
async def test_what_follows_the_last_request_does_not_touch_its_answer(gateway: Any, path: str) -> None:
    async with (
        FakeEngine(fake.stream(delay=0.02)) as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        method = "GET" if path == "/health" else "POST"
        caller.send(path, CHAT, method=method, headers={"connection": "close"})
        caller.raw(b"\r\nGET /health HTTP/1.1\r\n\r\n")
        assert (await caller.answer()).status == 200
        assert await asyncio.wait_for(caller.reader.read(), 2) == b""


async def test_a_connection_that_has_ended_is_gone_without_the_garbage_collector(raw_gateway: Any) -> None:
    def connections() -> int:
        return sum(isinstance(found, GatewayProtocol | Turn) for found in gc.get_objects())

    async with FakeEngine() as engine, raw_gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT)
        gc.collect()
        gc.disable()
        try:
            for path, body in (("/v1/chat/completions", CHAT), ("/chat", {"message": "x"}), ("/chat", {})):
                await ask(running.port, path, body)
            await get(running.port, "/health")
            async with await Caller.connect(running.port) as caller:
                caller.send("/v1/chat/completions", CHAT)
                caller.reset()
            await running.settled()
            await until(lambda: not connections())
        finally:
            gc.enable()
