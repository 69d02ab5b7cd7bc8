"""Which answers are kept, for whom, and for how long.

Proves:
- only deterministic requests have a key; anything that is not JSON has none;
- the key is the same for the same request in another order, and another one for any other value, model,
  route or caller; with `sharedBy: everyone` callers share;
- any two JSON objects that differ have different keys;
- in memory: an answer is gone after its time, the bytes stay within the bound, the least used goes first, one
  larger than everything is not kept;
- in a real Valkey: an answer comes back byte for byte, also to another gateway, and is gone after its time; a
  value of somebody else's is none; while Valkey is away there are no answers and no errors; while it is slow
  no more than so many answers wait for it in memory.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from valkey_server import Valkey, valkey

from vllm_gateway.policy.cache import Answer, MemoryStore, Recorder, SharedStore, cache_key
from vllm_gateway.policy.keys import ANONYMOUS, Caller
from vllm_gateway.policy.shared import Shared
from vllm_gateway.settings import CacheSettings, RedisSettings

CHAT = "/v1/chat/completions"
STREAM = Answer(b"text/event-stream; charset=utf-8", b'data: {"a":"\xc3\xa9\\n"}\n\ndata: [DONE]\n\n')


def key(
    document: object, model: str = "ns/m", route: str = CHAT, caller: Caller = ANONYMOUS, **settings: str
) -> str | None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return cache_key(model, route, body, caller, TypeAdapter(CacheSettings).validate_python(settings))


@pytest.mark.parametrize(
    ("document", "kept"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "stream": True}, True),
        ({"seed": 7, "temperature": 1}, True),
        ({"seed": 0}, True),
        ({}, False),
        ({"temperature": 0.1}, False),
        ({"temperature": None, "seed": None}, False),
        ({"temperature": False}, False),
        ({"seed": True}, False),
        ({"temperature": "0"}, False),
        ([], False),
        (b"{", False),
        (b'"\xff"', False),
        (b"[" * 100_000, False),
    ],
)
def test_only_deterministic_requests_have_a_key(document: object, kept: bool) -> None:
    assert (key(document) is not None) is kept


def test_embeddings_are_always_deterministic() -> None:
    assert key({"input": "x"}, route="/v1/embeddings") is not None


def test_what_a_key_depends_on() -> None:
    document = {"temperature": 0, "messages": [{"role": "user", "content": "x"}]}
    same = b'{ "messages": [{"content": "\\u0078", "role": "user"}],\n "temperature": 0 }'
    assert key(document) == key(same)
    alice, bob = Caller("alice"), Caller("bob")
    others = [
        key(document),
        key(document | {"max_tokens": 1}),
        key(document | {"stream": True}),
        key(document, model="ns/other"),
        key(document, route="/chat"),
        key(document, caller=alice),
        key(document, caller=bob),
    ]
    assert len(set(others)) == len(others)
    assert key(document, caller=alice, sharedBy="everyone") == key(document, caller=bob, sharedBy="everyone")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, JSON)
def test_different_requests_have_different_keys(one: Any, two: Any) -> None:
    first, second = (key({"temperature": 0, "x": value}) for value in (one, two))
    assert (first == second) == (json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_answers_in_memory_end_with_their_time() -> None:
    clock = Clock()
    store = MemoryStore(10_000, clock)
    store.put("short", STREAM, 10)
    store.put("long", STREAM, 100)
    clock.now = 9.9
    assert await store.get("short") == STREAM
    clock.now = 10.1
    assert await store.get("short") is None
    assert await store.get("long") == STREAM


async def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    store = MemoryStore(100_000)
    for number in range(1000):
        store.put(str(number), Answer(b"", bytes(2000)), 60)
        await store.get("0")
        assert store.size <= 100_000
    assert await store.get("0") is not None
    assert await store.get("1") is None
    assert await store.get("999") is not None
    store.put("huge", Answer(b"", bytes(200_000)), 60)
    assert await store.get("huge") is None
    assert await store.get("999") is not None


def test_a_recording_over_the_limit_is_let_go() -> None:
    recorder = Recorder(10)
    recorder.add(b"12345")
    recorder.add(b"67890")
    assert recorder.body() == b"1234567890"
    recorder.add(b"x")
    assert recorder.body() is None
    recorder.add(b"y")
    assert recorder.body() is None


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


async def test_answers_in_valkey(server: Valkey) -> None:
    servers = [Shared(RedisSettings(url=server.url)) for _ in range(2)]
    one, two = (SharedStore(shared) for shared in servers)
    one.put("k", STREAM, 60)
    one.put("brief", STREAM, 0.05)
    await one.stop()
    assert await two.get("k") == STREAM
    assert await two.get("other") is None
    await asyncio.sleep(0.1)
    assert await two.get("brief") is None
    for shared in servers:
        await shared.close()


async def test_a_value_that_is_no_answer(server: Valkey) -> None:
    shared = Shared(RedisSettings(url=server.url))
    store = SharedStore(shared)
    await store._redis.set("vllm-fleet/answer/strange", b"no line break")
    assert await store.get("strange") is None
    await store._redis.sadd("vllm-fleet/answer/list", b"x")  # type: ignore[misc]
    assert await store.get("list") is None
    await shared.close()


async def test_while_valkey_is_away(server: Valkey) -> None:
    shared = Shared(RedisSettings(url=server.url))
    store = SharedStore(shared)
    server.stop()
    try:
        store.put("k", STREAM, 60)
        await store.stop()
        assert await store.get("k") is None
        assert shared.failures == 1
    finally:
        server.start()
    await shared.close()


async def test_answers_do_not_pile_up_before_a_slow_valkey() -> None:
    with valkey() as server:
        shared = Shared(RedisSettings.model_validate({"url": server.url, "timeout": "5s"}))
        store = SharedStore(shared)
        await store._redis.execute_command("CLIENT", "PAUSE", 1000, "WRITE")  # type: ignore[no-untyped-call]
        for number in range(1000):
            store.put(str(number), STREAM, 60)
        assert len(store._puts) == 64
        await store.stop()
        assert await store.get("0") == STREAM
        assert await store.get("999") is None
        store.put("later", STREAM, 60)
        await store.stop()
        assert await store.get("later") == STREAM
        await shared.close()
