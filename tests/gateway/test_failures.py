"""What an engine can do wrong, and what the caller then gets (FACTS E1 to E17).

Over both channels unless said otherwise. After each, nothing is in flight and no connection is left.

Left out here: E8 to E10 (test_failures_of_callers, and slow readers in test_stall), E13 and E14
(test_request_limits), E6 while the gateway itself drains (test_drain), E12 (test_balancing), and connections
that age (test_engine_connections).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import engine as fake
import pytest
from engine import DONE, ENGINE_DIED, ROLE, FakeEngine, chat_events, finish, token
from http_caller import Answer, Caller, ask, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
UNARY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SIMPLE = {"message": "hi"}
# One timeout alone: on a busy machine a good answer may take longer than another one that is as short.
IDLE = {"timeouts": {"idle": "200ms"}}
SHORT = {"timeouts": {"firstToken": "200ms", "idle": "200ms", "unary": "300ms", "writeStall": "300ms"}}


def events_of(answer: Answer) -> list[Any]:
    parts = [part for part in answer.body.split(b"\n\n") if part]
    return [part[6:] if part == b"data: [DONE]" else json.loads(part[6:]) for part in parts]


async def ends_with_one_error(running: Any, code: str, outcome: str) -> None:
    """Both families: the engine's events, one error event, the family's end, and the metrics know."""
    answer = await ask(running.port, "/v1/chat/completions", CHAT)
    events = events_of(answer)
    assert answer.body.startswith(ROLE)
    assert events[-1] == b"[DONE]"
    assert events[-2]["error"]["code"] == code
    assert sum("error" in item for item in events if isinstance(item, dict)) == 1

    answer = await ask(running.port, "/chat/stream", SIMPLE)
    events = events_of(answer)
    assert events[-1]["done"] is True
    assert events[-1]["finish_reason"] == "error"
    assert events[-2]["error"]["code"] == code
    assert sum("error" in item for item in events) == 1

    await running.settled()
    assert running.metric("streams_ended_total", model="m", outcome=outcome) == 2
    assert running.metric("upstream_errors_total", model="m", reason=outcome) == 2


@pytest.mark.parametrize(("how", "outcome"), [("close", "eof"), ("reset", "reset"), ("end", "eof")])
async def test_e01_an_engine_that_dies_in_the_middle_ends_the_stream_with_one_error(
    gateway: Any, how: str, outcome: str
) -> None:
    script = fake.pieces([ROLE, token("a"), b'data: {"half'], then=how)
    async with FakeEngine(script) as engine, gateway(engine) as running:
        await ends_with_one_error(running, "engine_closed", outcome)


async def test_e01_an_engine_that_dies_after_its_last_event_has_finished_the_stream(gateway: Any) -> None:
    events = chat_events(["a"], with_usage=False)
    async with FakeEngine(fake.pieces(events, then="close")) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == b"".join(events)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1


async def test_e01_a_cut_inside_a_huge_event_cuts_the_caller_too_and_nothing_follows_half_an_event(
    gateway: Any,
) -> None:
    half = b'data: {"choices":[{"delta":{"content":"' + b"x" * 300_000
    async with FakeEngine(fake.pieces([ROLE, half], then="reset")) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await caller.chunks()
        await running.settled()


async def test_e02_an_in_band_error_counts_as_a_failure_and_is_passed_on(gateway: Any) -> None:
    script = fake.pieces([ROLE, token("a"), ENGINE_DIED, DONE])
    async with FakeEngine(script) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == ROLE + token("a") + ENGINE_DIED + DONE
        answer = await ask(running.port, "/chat/stream", SIMPLE)
        events = events_of(answer)
        assert events[-2]["error"]["message"] == "EngineCore died"
        assert events[-1]["finish_reason"] == "error"
        await running.settled()
        assert running.metric("upstream_errors_total", model="m", reason="in_band_error") == 2
        assert running.metric("streams_ended_total", model="m", outcome="in_band_error") == 2


async def test_e03_finish_reason_abort_counts_as_a_failure(gateway: Any) -> None:
    script = fake.pieces([ROLE, token("a"), finish("abort"), DONE])
    async with FakeEngine(script) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert finish("abort") in answer.body
        answer = await ask(running.port, "/chat/stream", SIMPLE)
        assert [min(item) for item in events_of(answer)] == ["token", "error", "done"]
        await running.settled()
        assert running.metric("upstream_errors_total", model="m", reason="abort") == 2


async def test_e04_an_engine_that_stalls_after_its_first_token_is_given_up(gateway: Any) -> None:
    script = fake.pieces([ROLE, token("a")], then="stall")
    async with FakeEngine(script) as engine, gateway(engine, options=IDLE) as running:
        await ends_with_one_error(running, "idle_timeout", "idle_timeout")
        await until(lambda: engine.active == 0)


async def test_e04_comments_are_passed_on_but_are_no_progress(gateway: Any) -> None:
    script = fake.forever(b": keep-alive\n\n", first=[ROLE, token("a")], every=0.02)
    async with FakeEngine(script) as engine, gateway(engine, options=IDLE) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert b": keep-alive\n\n" in answer.body
        assert answer.body.endswith(b'"code": "idle_timeout"}}\n\n' + DONE)


async def test_e04_a_head_and_an_opening_chunk_are_no_token(gateway: Any) -> None:
    script = fake.pieces([ROLE], then="stall")
    settings = {"timeouts": {"firstToken": "200ms"}}
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        await ends_with_one_error(running, "first_token_timeout", "first_token_timeout")


async def test_e05_an_engine_that_never_answers_is_a_504(gateway: Any) -> None:
    async with FakeEngine(fake.never) as engine, gateway(engine, options=SHORT) as running:
        for path, body, code in (
            ("/v1/chat/completions", CHAT, "first_token_timeout"),
            ("/v1/chat/completions", UNARY, "engine_timeout"),
            ("/chat/stream", SIMPLE, "first_token_timeout"),
            ("/chat", SIMPLE, "engine_timeout"),
        ):
            answer = await ask(running.port, path, body)
            assert (answer.status, answer.json()["error"]["code"]) == (504, code)
        await running.settled()
        await until(lambda: engine.active == 0)


SHUTTING_DOWN = {"error": {"message": "cannot schedule new futures after shutdown", "code": 500}}


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_e06_a_refusal_of_a_draining_engine_is_tried_elsewhere(gateway: Any, status: int) -> None:
    async with (
        FakeEngine(fake.answer(status, SHUTTING_DOWN)) as bad,
        FakeEngine() as good,
        gateway(bad, good) as running,
    ):
        asked = 0
        while not bad.seen:  # which of the two is asked first is drawn by lot
            answer = await ask(running.port, "/v1/chat/completions", CHAT)
            asked += 1
            assert answer.body.endswith(DONE)
            assert len(good.seen) == asked < 200
        assert running.metric("retries_total") == len(bad.seen) == 1


async def test_e07_a_reused_connection_that_the_engine_just_closed_is_no_failure(gateway: Any) -> None:
    async def closes_after_each(reply: fake.Reply) -> None:
        await fake.stream()(reply)
        reply.keep_alive = False  # without having said `connection: close`

    async with FakeEngine(closes_after_each) as engine, gateway(engine) as running:
        for _ in range(5):
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)


async def test_e07_the_race_itself_request_sent_as_the_engine_closes(gateway: Any) -> None:
    """The engine reads the second request of a connection, then closes without a byte."""
    served: set[asyncio.StreamWriter] = set()

    async def script(reply: fake.Reply) -> None:
        if reply.writer in served:
            reply.close()
            return
        served.add(reply.writer)
        await fake.stream()(reply)

    async with FakeEngine(script) as engine, gateway(engine) as running:
        for _ in range(4):
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).body.endswith(DONE)
        assert running.metric("retries_total") > 0


async def test_a_new_connection_that_the_engine_closes_without_an_answer_is_not_tried_again(
    gateway: Any,
) -> None:
    """The request itself may have killed the engine: it must not kill the next."""
    async with (
        FakeEngine(fake.raw([])) as one,
        FakeEngine(fake.raw([])) as other,
        gateway(one, other) as running,
    ):
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_closed")
        assert len(one.seen) + len(other.seen) == 1


async def test_e11_engines_that_are_all_full_are_a_503_with_retry_after_and_no_retry_storm(
    gateway: Any,
) -> None:
    full = fake.answer(503, {"error": {"message": "queue full", "type": "Service Unavailable", "code": 503}})
    async with FakeEngine(full) as one, FakeEngine(full) as other, gateway(one, other) as running:
        for _ in range(50):
            answer = await ask(running.port, "/v1/chat/completions", CHAT)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["message"] == "queue full"
        # One retry a request would be 100; the budget is a reserve of 10 and a fifth of the requests.
        assert len(one.seen) + len(other.seen) <= 50 + 10 + 50 / 5


async def test_a_request_never_runs_on_more_than_three_engines(gateway: Any) -> None:
    async with (
        FakeEngine(fake.answer(503, {})) as a,
        FakeEngine(fake.answer(503, {})) as b,
        FakeEngine(fake.answer(503, {})) as c,
        FakeEngine(fake.answer(503, {})) as d,
        gateway(a, b, c, d) as running,
    ):
        assert (await ask(running.port, "/v1/chat/completions", CHAT)).status == 503
        assert sum(len(engine.seen) for engine in (a, b, c, d)) == 3


async def test_an_endpoint_that_refuses_connections_is_left_for_another(gateway: Any) -> None:
    async with FakeEngine() as good, FakeEngine() as dead, gateway(good, dead) as running:
        await dead.__aexit__(None, None, None)
        while not running.metric("retries_total"):  # which of the two is asked first is drawn by lot
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).status == 200
            assert len(good.seen) < 200


async def test_the_only_endpoint_refusing_connections_is_a_503_with_retry_after(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        await engine.__aexit__(None, None, None)
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "engine_unreachable")
        assert answer.headers["retry-after"] == "1"
        assert "127.0.0.1" not in answer.json()["error"]["message"]


async def test_once_a_byte_has_come_nothing_is_tried_again(gateway: Any) -> None:
    script = fake.raw([b"HTTP/1.1 200 OK\r\ncontent-le"], then="close")
    async with FakeEngine(script) as one, FakeEngine(script) as other, gateway(one, other) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.status == 502
        assert len(one.seen) + len(other.seen) == 1


NOT_HTTP = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nx",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
    "long head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
}


@pytest.mark.parametrize("wire", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_an_engine_that_does_not_speak_http_is_a_502(gateway: Any, wire: bytes) -> None:
    async with FakeEngine(fake.raw([wire], then="stall")) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_bad_response")
        await running.settled()


@pytest.mark.parametrize("size", [b"-1", b"0x5", b"1_0", b"123456789", b"", b" 5", b"5 5"])
async def test_a_chunk_without_a_valid_size_ends_the_stream_with_one_error(gateway: Any, size: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    first = b"%x\r\n%b\r\n" % (len(ROLE), ROLE)
    script = fake.raw([head + first, size + b"\r\nhello\r\n"], then="stall")
    async with FakeEngine(script) as engine, gateway(engine) as running:
        events = events_of(await ask(running.port, "/v1/chat/completions", CHAT))
        assert events[-2]["error"]["code"] == "engine_bad_response"
        await running.settled()
        await until(lambda: engine.active == 0)


async def test_a_unary_answer_that_breaks_off_is_a_502_and_never_half_an_answer(gateway: Any) -> None:
    wire = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"half'
    async with FakeEngine(fake.raw([wire])) as engine, gateway(engine) as running:
        for path, body in (("/v1/chat/completions", UNARY), ("/chat", SIMPLE)):
            answer = await ask(running.port, path, body)
            assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_closed")


async def test_the_head_and_the_body_of_a_unary_answer_have_one_time_together(gateway: Any) -> None:
    wire = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n", b"{}"

    async def script(reply: fake.Reply) -> None:
        for piece in wire:
            await asyncio.sleep(0.7)
            await reply.raw(piece)

    async with (
        FakeEngine(script) as engine,
        gateway(engine, options={"timeouts": {"unary": "1s"}}) as running,
    ):
        answer = await ask(running.port, "/v1/embeddings", {"model": "m", "input": "x"})
        assert (answer.status, answer.json()["error"]["code"]) == (504, "engine_timeout")
        await running.settled()


async def test_a_unary_answer_over_the_limit_is_a_502(gateway: Any) -> None:
    big = fake.answer(200, {"data": "x" * 100_000})
    settings = {"limits": {"answerBytes": 50_000}}
    async with FakeEngine(big) as engine, gateway(engine, options=settings) as running:
        answer = await ask(running.port, "/v1/embeddings", {"model": "m", "input": "x"})
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_answer_too_large")


async def test_many_failures_leave_nothing_behind(gateway: Any) -> None:
    scripts = fake.in_turn(
        *[
            fake.pieces([ROLE, token("a")], then="reset"),
            fake.raw([]),
            fake.pieces([ROLE], then="stall"),
            fake.answer(500, {"detail": "x"}),
            fake.forever(token("a"), first=[ROLE]),
        ]
        * 20
    )

    async def once(port: int, number: int) -> None:
        async with await Caller.connect(port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await asyncio.sleep(0.005 * (number % 7))

    async with FakeEngine(scripts) as engine, gateway(engine, options=SHORT) as running:
        for start in range(0, 100, 20):
            await asyncio.gather(*(once(running.port, start + number) for number in range(20)))
        await running.settled()
        await until(lambda: engine.active == 0)
        await until(lambda: engine.connections == running.gateway.client.idle_count)
