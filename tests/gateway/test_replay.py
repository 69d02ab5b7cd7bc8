"""The response cache on a request's path, over real sockets and both channels.

Proves:
- a repeated deterministic request is answered without an engine, byte for byte as before, streamed or not and
  on every family of routes; `x-cache` and the metric say hit, miss or bypass;
- what is not deterministic, what another key asked, and what another model, or other pods of the same one,
  would answer, is never taken;
- only whole answers are kept: none of an engine that failed before, in or at the end of an answer, none of a
  caller that left, none over the limit; an answer ends with its time;
- a hit needs no place in the queue, but a good key, and counts as a request and not as tokens;
- two gateways with one Valkey share answers;
- while a slow Valkey takes an answer, its caller has it, whole even if the gateway stops now, and what the
  request held is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine as fake
import pytest
import redis
from engine import ENGINE_DIED, ROLE, FakeEngine, finish, token
from http_caller import Caller, ask
from valkey_server import valkey

from vllm_gateway.routing.table import Endpoint, Model, Table

COLD = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
KEY = {"x-api-key": "sk-a-123456"}
ROUTES = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", COLD),
        ("/v1/chat/completions", COLD | {"stream": True}),
        ("/v1/chat/completions", COLD | {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/embeddings", {"model": "m", "input": "x"}),
        ("/chat", {"message": "hi", "temperature": 0}),
        ("/chat/stream", {"message": "hi", "temperature": 0}),
    ],
)
STREAMS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", COLD | {"stream": True}),
        ("/chat/stream", {"message": "hi", "temperature": 0}),
    ],
)


def options(**cache: Any) -> dict[str, Any]:
    return {"responseCache": {"ttl": "1m", **cache}, "timeouts": {"idle": "500ms", "firstToken": "500ms"}}


@ROUTES
async def test_a_repeated_request_is_answered_without_an_engine(gateway: Any, path: str, body: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options()) as running:
        first = await ask(running.port, path, body)
        again = await ask(running.port, path, dict(reversed(body.items())))
        assert (first.status, first.headers["x-cache"]) == (200, "miss")
        assert (again.status, again.headers["x-cache"]) == (200, "hit")
        assert again.body == first.body
        assert again.headers["content-type"] == first.headers["content-type"]
        assert len(engine.seen) == 1
        assert running.metric("cache_requests_total", result="hit") == 1
        assert running.metric("cache_requests_total", result="miss") == 1
        await running.settled()


async def test_what_is_never_taken(gateway: Any) -> None:
    async with FakeEngine(models=["m", "n"]) as engine, gateway(engine, options=options()) as running:
        await ask(running.port, "/v1/chat/completions", COLD)
        for other in (
            COLD | {"temperature": 0.5},
            COLD | {"temperature": 0.5},
            COLD | {"model": "n"},
            COLD | {"max_tokens": 3},
            COLD | {"stream": True},
        ):
            answer = await ask(running.port, "/v1/chat/completions", other)
            assert answer.headers.get("x-cache") == ("miss" if other["temperature"] == 0 else None)
        assert len(engine.seen) == 6
        assert running.metric("cache_requests_total", result="bypass") == 2


async def test_without_a_time_to_live_there_is_no_cache(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        for _ in range(2):
            assert "x-cache" not in (await ask(running.port, "/v1/chat/completions", COLD)).headers
        assert len(engine.seen) == 2


@STREAMS
@pytest.mark.parametrize(
    "script",
    [
        fake.answer(400, {"error": {"message": "no"}}),
        fake.answer(500, {"error": {"message": "no"}}),
        fake.pieces([ROLE, token("a")], then="reset"),
        fake.pieces([ROLE, token("a")], then="stall"),
        fake.pieces([ROLE, token("a"), ENGINE_DIED, fake.DONE]),
        fake.pieces([ROLE, finish("abort"), fake.DONE]),
    ],
)
async def test_only_whole_answers_are_kept(gateway: Any, path: str, body: Any, script: fake.Script) -> None:
    async with FakeEngine(script) as engine, gateway(engine, options=options()) as running:
        for _ in range(2):
            assert (await ask(running.port, path, body)).headers.get("x-cache") != "hit"
        assert len(engine.seen) == 2
        engine.script = fake.stream()
        assert (await ask(running.port, path, body)).headers["x-cache"] == "miss"
        assert (await ask(running.port, path, body)).headers["x-cache"] == "hit"
        await running.settled()


@STREAMS
async def test_an_answer_whose_caller_left_is_not_kept(gateway: Any, path: str, body: Any) -> None:
    async with FakeEngine(fake.stream(delay=0.02)) as engine, gateway(engine, options=options()) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send(path, body)
            await caller.head()
            await caller.chunk()
            caller.reset()
        await running.settled()
        assert (await ask(running.port, path, body)).headers["x-cache"] == "miss"


@ROUTES
async def test_a_large_answer_is_served_and_not_kept(gateway: Any, path: str, body: Any) -> None:
    script = fake.stream(["x" * 600] * 3)
    async with FakeEngine(script) as engine, gateway(engine, options=options(entryBytes=1500)) as running:
        for _ in range(2):
            answer = await ask(running.port, path, body)
            assert (answer.headers["x-cache"], answer.body.count(b"x" * 600) > 0) == ("miss", True)


async def test_an_answer_ends_with_its_time(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options(ttl="50ms")) as running:
        await ask(running.port, "/v1/chat/completions", COLD)
        await asyncio.sleep(0.1)
        assert (await ask(running.port, "/v1/chat/completions", COLD)).headers["x-cache"] == "miss"


async def test_keys_do_not_share_answers_and_a_hit_counts_as_a_request(gateway: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(
        "keys:\n"
        "- {name: alice, key: sk-alice-123456, limits: {requestsPerMinute: 3, tokensPerMinute: 1000}}\n"
        "- {name: bob, key: sk-bob-12345678}\n"
    )
    alice, bob = {"x-api-key": "sk-alice-123456"}, {"x-api-key": "sk-bob-12345678"}
    settings = options() | {"auth": {"keysFile": str(tmp_path / "keys.yaml")}}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        found = [
            await ask(running.port, "/v1/chat/completions", COLD, headers=headers)
            for headers in (alice, bob, alice, bob, {}, alice, alice)
        ]
        assert [answer.status for answer in found] == [200, 200, 200, 200, 401, 200, 429]
        assert [answer.headers.get("x-cache") for answer in found[:4]] == ["miss", "miss", "hit", "hit"]
        assert len(engine.seen) == 2
        assert running.metric("tokens_total", model="m", key="alice", kind="completion") == 3


async def test_answers_of_other_weights_under_the_same_name_are_not_taken(gateway: Any) -> None:
    settings = options() | {"refreshInterval": "1h"}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        (known,) = running.gateway.holder().models.values()
        for revision, expected in (("a", "miss"), ("a", "hit"), ("b", "miss"), ("b", "hit"), ("a", "hit")):
            running.gateway.holder.put(Table.of([dataclasses.replace(known, revision=revision)]))
            answer = await ask(running.port, "/v1/chat/completions", COLD)
            assert (revision, answer.headers["x-cache"]) == (revision, expected)


async def test_a_hit_needs_no_place_in_the_queue(gateway: Any) -> None:
    settings = options() | {"queue": {"maxInFlight": 1, "maxQueue": 0}, "timeouts": {}}
    script = fake.in_turn(fake.stream(), fake.never)
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        await ask(running.port, "/v1/chat/completions", COLD)
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat", {"message": "x"})
            while engine.active == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert (await ask(running.port, "/chat", {"message": "y"})).status == 429
            assert (await ask(running.port, "/v1/chat/completions", COLD)).headers["x-cache"] == "hit"
        await running.settled()


@STREAMS
async def test_two_gateways_share_answers_through_valkey(gateway: Any, path: str, body: Any) -> None:
    with valkey() as server:
        settings = options() | {"redis": {"url": server.url}}
        async with (
            FakeEngine() as engine,
            gateway(engine, options=settings) as one,
            gateway(engine, options=settings) as two,
        ):
            first = await ask(one.port, path, body)
            await one.gateway.services.answers.stop()
            second = await ask(two.port, path, body)
            assert (first.headers["x-cache"], second.headers["x-cache"]) == ("miss", "hit")
            assert first.body == second.body
            assert two.metric("redis_away") == 0
            server.stop()
            third = await ask(two.port, path, body)
            assert two.metric("redis_away") == 1
            assert (third.status, third.headers["x-cache"], third.body) == (200, "miss", first.body)


@contextlib.contextmanager
def slow_valkey(milliseconds: int) -> Iterator[str]:
    """Its URL. It reads as ever, and writes nothing for so long."""
    with valkey() as server, redis.Redis(port=server.port) as client:
        client.execute_command("CLIENT", "PAUSE", milliseconds, "WRITE")
        yield server.url


async def test_a_caller_and_its_permit_do_not_wait_for_valkey_to_keep_an_answer(
    gateway: Any, tmp_path: Path
) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [{name: a, key: sk-a-123456, limits: {concurrency: 1}}]")
    auth = {"auth": {"keysFile": str(tmp_path / "keys.yaml")}}
    with slow_valkey(1500) as url:
        settings = options() | auth | {"redis": {"url": url, "timeout": "5s"}, "queue": {"maxInFlight": 1}}
        async with FakeEngine() as engine, gateway(engine, options=settings) as running:
            for number in range(4):
                body = COLD | {"max_tokens": number + 1, "stream": number % 2 == 0}
                answer = await ask(running.port, "/v1/chat/completions", body, headers=KEY)
                assert (answer.status, answer.headers["x-cache"]) == (200, "miss")
            await running.settled()
            assert running.gateway.services.answers._puts
            await running.gateway.services.answers.stop()
            answer = await ask(running.port, "/v1/chat/completions", COLD | {"max_tokens": 4}, headers=KEY)
            assert answer.headers["x-cache"] == "miss"  # that one was a stream's
            body = COLD | {"max_tokens": 4, "stream": False}
            answer = await ask(running.port, "/v1/chat/completions", body, headers=KEY)
            assert answer.headers["x-cache"] == "hit"


async def test_an_answer_that_is_under_way_to_its_caller_and_to_valkey_is_not_cut_by_the_end(
    raw_gateway: Any,
) -> None:
    size = 16_000_000  # far more than the kernel takes
    script = fake.answer(200, {"embedding": "0" * size})
    with slow_valkey(2000) as url:
        settings = options(entryBytes=2 * size) | {"redis": {"url": url, "timeout": "10s"}, "timeouts": {}}
        async with (
            FakeEngine(script) as engine,
            raw_gateway(engine, options=settings | {"drainTimeout": "300ms"}) as running,
            await Caller.connect(running.port, receive_buffer=64 * 1024) as caller,
        ):
            caller.send("/v1/embeddings", {"model": "m", "input": "x"})
            length = int((await caller.head()).headers["content-length"])
            running.server.should_exit = True
            await asyncio.sleep(1.0)  # the drain is over
            assert len(await caller.reader.readexactly(length)) > size
            assert running.metric("refusals_total", code="shutting_down") == 0


async def test_an_answer_of_another_model_of_the_same_name_is_not_kept(gateway: Any) -> None:
    settings = options() | {"refreshInterval": "1h"}
    async with (
        FakeEngine(fake.answer(503, {"error": {"message": "full"}})) as first,
        FakeEngine(fake.stream(["other"])) as other,
        gateway(other, options=settings) as running,
    ):
        ends = [(Endpoint(name, "127.0.0.1", end.port),) for name, end in (("f", first), ("o", other))]
        models = [
            Model("first", "m", "ns", ("m",), ends[0], weight=1),
            Model("other", "m", "ns", ("m",), ends[1], weight=0),
        ]
        running.gateway.holder.put(Table.of(models))
        for body in (COLD, COLD | {"stream": True}):
            assert b"other" in (await ask(running.port, "/v1/chat/completions", body)).body
        first.script = fake.stream(["first"])
        for body in (COLD, COLD | {"stream": True}):
            answer = await ask(running.port, "/v1/chat/completions", body)
            assert (answer.headers["x-cache"], b"first" in answer.body) == ("miss", True)
        await running.settled()
