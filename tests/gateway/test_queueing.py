"""Waiting for a place, over real sockets and both channels.

Proves:
- a busy model's requests wait in order and are all served; one too many is a 429 in its family's shape;
- a place that does not come in time is a real 503 with Retry-After while nothing has been sent, also for a
  stream; after the first comment it is one error event with code and retry_after, and the family's end;
- a waiting stream gets its head and comments, then its events, and nothing twice; a unary answer waits
  silently;
- a waiting caller that leaves, or is cancelled by the drain, gives its place back; the latter is told;
- after the head has gone out, whatever the engine does wrong is one error event;
- a model without an endpoint: a request waits for the first one where the model scales from zero or is about
  to serve, as in a rollout, and is told why where that takes too long; it is refused at once where neither is
  so or the model is stalled, and when the model is removed;
- /load and the metrics say who waits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import engine as fake
import pytest
from engine import DONE, FakeEngine
from http_caller import Answer, Caller, ask, get, until

from vllm_gateway.routing.table import Endpoint, Limits, Model, Table
from vllm_gateway.web.health import load_report

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
UNARY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SIMPLE = {"message": "hi"}
STREAMS = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/chat/stream", SIMPLE)]
)
COMMENT = b": waiting\n\n"


class Gate:
    """An engine that holds every answer until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, reply: fake.Reply) -> None:
        await self.open.wait()
        await fake.stream()(reply)


def options(**queue: Any) -> dict[str, Any]:
    return {"queue": {"maxInFlight": 1, "maxQueue": 2, **queue}, "refreshInterval": "1h"}


def start(running: Any, path: str, body: object) -> asyncio.Task[Answer]:
    return asyncio.create_task(ask(running.port, path, body))


def queued(running: Any, model: str = "m") -> float:
    return float(running.metric("queued", model=model))


def last_error(path: str, body: bytes) -> dict[str, Any]:
    """The one error event of a stream that has nothing but comments before it."""
    events = [part for part in body.split(b"\n\n") if part.startswith(b"data:")]
    assert len(events) == 2
    if path.startswith("/v1"):
        assert events[-1] + b"\n\n" == DONE
    else:
        last = json.loads(events[-1][6:])
        assert (last["done"], last["finish_reason"]) == (True, "error")
    return json.loads(events[0][6:])["error"]  # type: ignore[no-any-return]


async def test_requests_wait_in_order_and_one_too_many_is_told(gateway: Any) -> None:
    gate = Gate()
    async with FakeEngine(gate) as engine, gateway(engine, options=options()) as running:
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        waiting = []
        for number, path in enumerate(("/v1/chat/completions", "/chat")):
            waiting.append(start(running, path, UNARY if path.startswith("/v1") else SIMPLE))
            await until(lambda number=number: queued(running) == number + 1)  # type: ignore[misc]
        for path, body in (("/v1/chat/completions", CHAT), ("/chat/stream", SIMPLE), ("/chat", SIMPLE)):
            answer = await ask(running.port, path, body)
            assert (answer.status, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            assert ("param" in answer.json()["error"]) is path.startswith("/v1")
        assert running.metric("refusals_total", code="queue_full") == 3
        assert load_report(running.gateway.services)["models"]["m"]["queued"] == 2
        assert load_report(running.gateway.services)["models"]["m"]["oldest_queued_seconds"] > 0
        assert engine.active == 1
        gate.open.set()
        assert [(await task).status for task in (first, *waiting)] == [200, 200, 200]
        assert [seen.path for seen in engine.seen] == ["/v1/chat/completions"] * 3
        assert "stream" not in engine.seen[1].json()
        await running.settled()
        assert queued(running) == 0
        assert running.metric("queue_wait_seconds_count", model="m") == 2


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/chat/stream", SIMPLE), ("/chat", SIMPLE)]
)
async def test_a_place_that_does_not_come_is_a_503(gateway: Any, path: str, body: object) -> None:
    settings = options(queueTimeout="50ms")
    async with FakeEngine(fake.never) as engine, gateway(engine, options=settings) as running:
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        answer = await ask(running.port, path, body)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        first.cancel()
        await running.settled()


@STREAMS
async def test_a_waiting_stream_gets_comments_then_its_events(gateway: Any, path: str, body: object) -> None:
    gate = Gate()
    async with FakeEngine(gate) as engine, gateway(engine, options=options(keepAlive="20ms")) as running:
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        async with await Caller.connect(running.port) as caller:
            caller.send(path, body)
            head = await caller.head()
            assert head.headers["content-type"].startswith("text/event-stream")
            assert [await caller.chunk() for _ in range(3)] == [COMMENT] * 3
            gate.open.set()
            body_bytes = b"".join(await caller.chunks()).replace(COMMENT, b"")
        plain = await ask(running.port, path, body)
        assert body_bytes == plain.body
        assert (await first).status == 200
        await running.settled()


@STREAMS
async def test_after_the_first_comment_a_refusal_is_one_event(gateway: Any, path: str, body: object) -> None:
    settings = options(keepAlive="20ms", queueTimeout="100ms")
    async with FakeEngine(fake.never) as engine, gateway(engine, options=settings) as running:
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        answer = await ask(running.port, path, body)
        assert answer.status == 200
        assert answer.body.startswith(COMMENT)
        error = last_error(path, answer.body)
        assert error["code"] == "queue_timeout"
        assert error["retry_after"] >= 1
        assert running.metric("streams_ended_total", model="m", outcome="queue_timeout") == 1
        first.cancel()
        await running.settled()


@STREAMS
@pytest.mark.parametrize(
    ("script", "code"),
    [
        (fake.answer(400, {"error": {"message": "no", "code": "bad"}}), "bad"),
        (fake.answer(500, {"error": {"message": "no"}}), "engine_error"),
        (fake.raw([b""], then="reset"), "engine_closed"),
        (fake.answer(200, {"choices": []}), "engine_bad_response"),
    ],
)
async def test_after_the_head_an_engines_failure_is_one_event(
    gateway: Any, path: str, body: object, script: fake.Script, code: str
) -> None:
    gate = Gate()

    async def first_waits(reply: fake.Reply) -> None:
        await gate(reply) if len(engine.seen) == 1 else await script(reply)

    async with (
        FakeEngine(first_waits) as engine,
        gateway(engine, options=options(keepAlive="20ms")) as running,
    ):
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        async with await Caller.connect(running.port) as caller:
            caller.send(path, body)
            await caller.head()
            gate.open.set()
            assert last_error(path, b"".join(await caller.chunks()))["code"] == code
        await first
        await running.settled()


@pytest.mark.parametrize("how", ["leave", "reset"])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_waiting_caller_that_leaves_gives_its_place_back(gateway: Any, how: str, begun: bool) -> None:
    gate = Gate()
    settings = options(keepAlive="20ms" if begun else "1h")
    async with FakeEngine(gate) as engine, gateway(engine, options=settings) as running:
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat/stream", SIMPLE)
            if begun:
                await caller.head()
            await until(lambda: queued(running) == 1)
            getattr(caller, how)()
            await until(lambda: queued(running) == 0)
        gate.open.set()
        await first
        await running.settled()
        assert len(engine.seen) == 1


@STREAMS
async def test_a_waiting_stream_is_told_of_the_drain(gateway: Any, path: str, body: object) -> None:
    async with (
        FakeEngine(fake.never) as engine,
        gateway(engine, options=options(keepAlive="20ms")) as running,
    ):
        first = start(running, "/chat", SIMPLE)
        await until(lambda: engine.active == 1)
        async with await Caller.connect(running.port) as caller:
            caller.send(path, body)
            await caller.head()
            running.server.drain(0.0)
            assert last_error(path, b"".join(await caller.chunks()))["code"] == "shutting_down"
        await asyncio.gather(first, return_exceptions=True)
        await running.settled()


def rollout(engine: FakeEngine, *, up: bool, reason: str = "Loading", starting: bool = True) -> Table:
    """A model that does not scale, while its only pod is replaced."""
    model = Model("m", "m", "ns", ("m",), starting=starting, reason=reason, message="since 12:00")
    if up:
        endpoints = (Endpoint("pod-2", "127.0.0.1", engine.port),)
        model = dataclasses.replace(model, endpoints=endpoints, starting=False, reason="", message="")
    return Table.of([model])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/stream", "/chat"])
async def test_a_rollout_without_a_spare_gpu_is_waited_for(gateway: Any, path: str) -> None:
    body = CHAT if path.startswith("/v1") else SIMPLE
    async with FakeEngine() as engine, gateway(engine, options=options(maxInFlight=9)) as running:
        holder = running.gateway.holder
        holder.put(rollout(engine, up=True))
        assert (await ask(running.port, path, body)).status == 200
        holder.put(rollout(engine, up=False))
        tasks = [start(running, path, body) for _ in range(2)]
        await until(lambda: queued(running, "ns/m") == 2)
        holder.put(rollout(engine, up=False, reason="Draining"))
        holder.put(rollout(engine, up=True))
        assert [(await task).status for task in tasks] == [200, 200]
        await running.settled()


async def test_a_rollout_that_takes_too_long_or_fails_says_why(gateway: Any) -> None:
    short = options(queueTimeout="50ms")
    async with FakeEngine() as engine, gateway(engine, options=short) as running:
        running.gateway.holder.put(rollout(engine, up=False))
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "model_not_ready")
        assert "Loading: since 12:00" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
    async with FakeEngine() as engine, gateway(engine, options=options()) as running:
        running.gateway.holder.put(rollout(engine, up=False))
        waiting = start(running, "/v1/chat/completions", CHAT)
        await until(lambda: queued(running, "ns/m") == 1)
        running.gateway.holder.put(rollout(engine, up=False, reason="CrashLooping", starting=False))
        answer = await waiting
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert "CrashLooping" in answer.json()["error"]["message"]


def cold(engine: FakeEngine, *, up: bool, seconds: float = 60.0, stalled: bool = False) -> Table:
    model = Model("m", "m", "ns", ("m",), stalled=stalled, limits=Limits(cold_start=seconds))
    if up:
        endpoints = (Endpoint("pod-1", "127.0.0.1", engine.port),)
        return Table.of([dataclasses.replace(model, endpoints=endpoints)])
    return Table.of([dataclasses.replace(model, reason="ScaledToZero", message="no replica runs")])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/stream", "/chat"])
async def test_a_cold_start_is_waited_for(gateway: Any, path: str) -> None:
    body = CHAT if path.startswith("/v1") else SIMPLE
    async with FakeEngine() as engine, gateway(engine, options=options(maxInFlight=9)) as running:
        running.gateway.holder.put(cold(engine, up=False))
        tasks = [start(running, path, body) for _ in range(2)]
        await until(lambda: queued(running, "ns/m") == 2)
        assert load_report(running.gateway.services)["models"]["ns/m"]["idle_seconds"] == 0
        running.gateway.holder.put(cold(engine, up=True))
        assert [(await task).status for task in tasks] == [200, 200]
        await running.settled()


async def test_a_cold_start_that_fails_says_why(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options()) as running:
        for table in (cold(engine, up=False, seconds=0.05), cold(engine, up=False, stalled=True)):
            running.gateway.holder.put(table)
            answer = await ask(running.port, "/v1/chat/completions", CHAT)
            assert (answer.status, answer.json()["error"]["code"]) == (503, "model_not_ready")
            assert "ScaledToZero: no replica runs" in answer.json()["error"]["message"]
            assert "retry-after" in answer.headers
        running.gateway.holder.put(cold(engine, up=False))
        waiting = start(running, "/chat", SIMPLE)
        await until(lambda: queued(running, "ns/m") == 1)
        running.gateway.holder.put(cold(engine, up=False, stalled=True))
        assert (await waiting).status == 503
        running.gateway.holder.put(cold(engine, up=False))
        waiting = start(running, "/chat", SIMPLE)
        await until(lambda: queued(running, "ns/m") == 1)
        running.gateway.holder.put(Table.of([]))
        assert (await waiting).status == 404
        await running.settled()
        assert (await get(running.port, "/health")).status == 200


async def test_two_thousand_waiting_requests_are_all_answered_and_nothing_is_left(gateway: Any) -> None:
    """Every way out at once: served, refused, left. Counts return to zero and memory of them is none."""
    settings = options(maxInFlight=8, maxQueue=50, keepAlive="5ms", queueTimeout="200ms")
    async with FakeEngine(fake.stream(["a"])) as engine, gateway(engine, options=settings) as running:

        async def one(number: int) -> int:
            async with await Caller.connect(running.port) as caller:
                caller.send("/chat/stream", SIMPLE)
                if number % 5 == 0:
                    await asyncio.sleep(number % 7 / 1000)
                    caller.reset()
                    return 0
                return (await caller.answer()).status

        for burst in range(20):
            found = await asyncio.gather(*(one(burst * 100 + number) for number in range(100)))
            assert set(found) <= {0, 200, 429, 503}
            assert 200 in found
        await running.settled()
        await until(lambda: engine.active == 0)
        assert all(queue.idle for queue in running.gateway.queues._queues.values())
