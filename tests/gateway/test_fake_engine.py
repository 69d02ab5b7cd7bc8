"""The scripted engine itself, seen by a plain HTTP client: what the other tests rest on.

Proves: a healthy stream is well-formed for a client that is not ours; each fault is on the wire what its
name says; what arrived and who left is recorded.
"""

from __future__ import annotations

import json

import engine as fake
import httpx
import pytest
from engine import DONE, ROLE, FakeEngine, chat_events, token
from http_caller import Caller, until

CHAT = {"model": "m", "messages": [], "stream": True, "stream_options": {"include_usage": True}}


async def test_a_healthy_engine_streams_and_answers_whole() -> None:
    async with FakeEngine(fake.stream(["a", "é"]), models=["x"]) as engine, httpx.AsyncClient() as client:
        url = f"{engine.url}/v1/chat/completions"
        answer = await client.post(url, json=CHAT)
        assert answer.headers["content-type"] == fake.SSE
        assert answer.content == b"".join(chat_events(["a", "é"], with_usage=True))
        answer = await client.post(url, json=CHAT | {"stream": False})
        assert answer.json()["choices"][0]["message"]["content"] == "aé"
        listed = await client.get(f"{engine.url}/v1/models")
        assert [item["id"] for item in listed.json()["data"]] == ["x"]
        assert [request.json()["stream"] for request in engine.seen] == [True, False]
        assert engine.accepted == 1


async def test_events_are_json_and_end_with_done() -> None:
    events = chat_events(["a"], with_usage=True)
    assert events[-1] == DONE
    assert all(json.loads(item[6:]) for item in events[:-1])


@pytest.mark.parametrize(
    ("then", "error"),
    [("close", httpx.RemoteProtocolError), ("reset", httpx.ReadError), ("stall", httpx.ReadTimeout)],
)
async def test_a_fault_is_on_the_wire_what_its_name_says(then: str, error: type[Exception]) -> None:
    async with (
        FakeEngine(fake.pieces([ROLE, token("a")], then=then)) as engine,
        httpx.AsyncClient(timeout=0.3) as client,
    ):
        with pytest.raises(error):
            await client.post(f"{engine.url}/v1/chat/completions", json=CHAT)


async def test_pieces_are_the_reads_of_the_other_side() -> None:
    async with (
        FakeEngine(fake.pieces([b"ab", b"c"], pause=0.02)) as engine,
        await Caller.connect(engine.port) as caller,
    ):
        caller.send("/x", CHAT)
        await caller.head()
        assert await caller.chunks() == [b"ab", b"c"]


async def test_a_caller_that_leaves_is_noticed() -> None:
    async with FakeEngine(fake.never) as engine:
        async with await Caller.connect(engine.port) as caller:
            caller.send("/x", CHAT)
            await until(lambda: engine.active > 0)
        await until(lambda: engine.active == 0)
        assert engine.abandoned == 1


async def test_scripts_take_turns_and_the_last_stays() -> None:
    script = fake.in_turn(fake.answer(500, {"detail": "x"}), fake.answer(200, {}))
    async with FakeEngine(script) as engine, httpx.AsyncClient() as client:
        statuses = [(await client.post(f"{engine.url}/x", json={})).status_code for _ in range(3)]
        assert statuses == [500, 200, 200]
