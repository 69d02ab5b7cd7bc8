"""Streams through a real gateway, from a scripted engine to a caller, over both channels.

Proves, for a healthy engine: the caller gets the engine's bytes unchanged but for the usage event that it
did not ask for, whole events in each write, tokens counted exactly, connections reused.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import engine as fake
import pytest
from engine import DONE, ROLE, FakeEngine, chat_events, event, finish, token, usage
from http_caller import Caller, ask

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def stream_chunks(port: int, path: str, body: object) -> list[bytes]:
    async with await Caller.connect(port) as caller:
        caller.send(path, body)
        head = await caller.head()
        assert head.status == 200, head
        return await caller.chunks()


async def test_a_stream_arrives_byte_for_byte_without_the_usage_event_that_nobody_asked_for(
    gateway: Any,
) -> None:
    async with FakeEngine(fake.stream(["a", "é", "😀"])) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == b"".join(chat_events(["a", "é", "😀"], with_usage=False))
        assert engine.seen[0].json()["stream_options"] == {"include_usage": True}
        await running.settled()
        assert running.metric("tokens_total", model="m", key="anonymous", kind="completion") == 3
        assert running.metric("tokens_total", model="m", key="anonymous", kind="prompt") == 7
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1


async def test_a_caller_that_asks_for_usage_gets_it_and_its_body_is_untouched(gateway: Any) -> None:
    body = json.dumps(CHAT | {"stream_options": {"include_usage": True, "x": 1}}).encode()
    async with FakeEngine(fake.stream(["a"])) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", body)
        assert answer.body == b"".join(chat_events(["a"], with_usage=True))
        assert engine.seen[0].body == body


async def test_the_head_of_a_stream_forbids_buffering_and_carries_the_request_id(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT, headers={"x-request-id": "abc-1"})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"] == "abc-1"
        assert engine.seen[0].headers["x-request-id"] == "abc-1"


async def test_tokens_come_one_by_one_as_the_engine_sends_them(gateway: Any) -> None:
    held = asyncio.Event()

    async def script(reply: fake.Reply) -> None:
        await reply.head()
        await reply.chunk(ROLE)
        await reply.chunk(token("first"))
        await held.wait()
        await reply.chunk(token("second"))
        await reply.chunk(DONE)
        await reply.end()

    async with (
        FakeEngine(script) as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", CHAT)
        await caller.head()
        seen = b""
        while token("first") not in seen:
            seen += await caller.chunk()
        held.set()
        assert b"".join(await caller.chunks()) == token("second") + DONE


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 333])
async def test_whatever_the_engines_reads_are_each_write_holds_whole_events(gateway: Any, size: int) -> None:
    events = chat_events(["Hel", "lo ", "wörld 😀"], with_usage=True)
    whole = b"".join(events)
    reads = [whole[at : at + size] for at in range(0, len(whole), size)]
    async with FakeEngine(fake.pieces(reads, pause=0.0005)) as engine, gateway(engine) as running:
        body = CHAT | {"stream_options": {"include_usage": True}}
        chunks = await stream_chunks(running.port, "/v1/chat/completions", body)
        assert b"".join(chunks) == whole
        assert all(chunk.endswith(b"\n\n") for chunk in chunks)


async def test_framing_split_at_any_byte_is_read_the_same(gateway: Any) -> None:
    events = chat_events(["a", "b"], with_usage=False)
    body = (
        b"".join(b"%x;ext=1\r\n%b\r\n" % (len(item), item) for item in events) + b"0\r\nx-trailer: 1\r\n\r\n"
    )
    wire = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + body
    for size in (1, 13):
        reads = [wire[at : at + size] for at in range(0, len(wire), size)]
        async with FakeEngine(fake.raw(reads, pause=0, then="end")) as engine, gateway(engine) as running:
            answer = await ask(running.port, "/v1/chat/completions", CHAT)
            assert answer.body == b"".join(events)


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
async def test_e17_other_line_ends_pass_through_unchanged(gateway: Any, line_end: bytes) -> None:
    whole = b"".join(chat_events(["a", "b"], with_usage=False)).replace(b"\n", line_end)
    async with FakeEngine(fake.pieces([whole[:30], whole[30:]])) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == whole
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1


async def test_e17_a_huge_event_passes_in_pieces_with_bounded_memory(gateway: Any) -> None:
    huge = event({"id": "x", "choices": [{"index": 0, "delta": {"content": "x" * 3_000_000}}]})
    async with FakeEngine(fake.pieces([ROLE, huge, DONE])) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == ROLE + huge + DONE


async def test_a_connection_to_the_engine_is_reused(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        for _ in range(3):
            assert (await ask(running.port, "/v1/chat/completions", CHAT)).status == 200
        assert len(engine.seen) == 3
        assert engine.accepted == 2  # one asked for the models


async def test_a_callers_connection_serves_one_request_after_another(gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        for path, body in (("/chat/stream", {"message": "x"}), ("/v1/chat/completions", CHAT)):
            caller.send(path, body)
            assert (await caller.answer()).status == 200
        caller.send("/health", method="GET")
        assert (await caller.answer()).status == 200


async def test_chat_stream_speaks_its_own_dialect(gateway: Any) -> None:
    async with FakeEngine(fake.stream(["Hé", "llo"])) as engine, gateway(engine) as running:
        chunks = await stream_chunks(running.port, "/chat/stream", {"message": "hi", "max_tokens": 9})
        events = [json.loads(item[6:]) for chunk in chunks for item in chunk.split(b"\n\n") if item]
        assert [item["token"] for item in events[:-1]] == ["Hé", "llo"]
        assert events[-1] == {
            "done": True,
            "model": "m",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        }
        assert b"".join(chunks).isascii()
        asked = engine.seen[0].json()
        assert asked["messages"] == [{"role": "user", "content": "hi"}]
        assert (asked["model"], asked["max_tokens"]) == ("m", 9)


async def test_a_usage_event_in_the_same_read_as_others_is_the_only_one_taken_out(gateway: Any) -> None:
    last = finish() + usage(7, 1) + DONE
    async with FakeEngine(fake.pieces([ROLE + token("a") + last])) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == ROLE + token("a") + finish() + DONE


async def test_a_hundred_streams_at_once_each_get_their_own_tokens(gateway: Any) -> None:
    async def script(reply: fake.Reply) -> None:
        word = reply.request.json()["messages"][0]["content"]
        await fake.stream([word] * 20, delay=0.001)(reply)

    async def one(port: int, word: str) -> bool:
        body = CHAT | {"messages": [{"role": "user", "content": word}]}
        answer = await ask(port, "/v1/chat/completions", body)
        return answer.body == b"".join(chat_events([word] * 20, with_usage=False))

    async with FakeEngine(script) as engine, gateway(engine) as running:
        assert all(await asyncio.gather(*(one(running.port, f"w{number}") for number in range(100))))
        await running.settled()


# vLLM has its fingerprint in the last event: the usage event, or those that finish where there is none.
PRINT = {"system_fingerprint": "vllm-0.32.0-tp2-1a2b3c4d"}


def with_print(piece: bytes) -> bytes:
    return event(json.loads(piece[6:]) | PRINT)


@pytest.mark.parametrize("reads", ["each", "one"])
async def test_what_the_usage_event_would_have_taken_from_the_caller_is_put_back(
    gateway: Any, reads: str
) -> None:
    sent = [ROLE, token("a"), finish(), with_print(usage(7, 1)), DONE]
    pieces = sent if reads == "each" else [b"".join(sent)]
    async with FakeEngine(fake.pieces(pieces)) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == ROLE + token("a") + with_print(finish()) + DONE


# Two choices (n=2) of which one ends before the other.
FIRST, SECOND = finish(), finish("length").replace(b'"index":0', b'"index":1')


async def test_a_choice_that_ends_early_is_not_held_for_the_others(gateway: Any) -> None:
    seen = asyncio.Event()

    async def script(reply: fake.Reply) -> None:
        await reply.head()
        for piece in (ROLE, token("a"), FIRST, token("b")):
            await reply.chunk(piece)
        await seen.wait()
        for piece in (SECOND, usage(7, 2), DONE):
            await reply.chunk(piece)
        await reply.end()

    async with (
        FakeEngine(script) as engine,
        gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", CHAT)
        await caller.head()
        got = b""
        while not got.endswith(token("b")):
            got += await asyncio.wait_for(caller.chunk(), 2)
        assert got == ROLE + token("a") + FIRST + token("b")
        seen.set()
        assert b"".join(await caller.chunks()) == SECOND + DONE


@pytest.mark.parametrize("reads", ["each", "one", "two"])
async def test_choices_that_end_keep_their_place_among_many_tokens(gateway: Any, reads: str) -> None:
    words = [token(f"t{number}") for number in range(12)]
    sent = [ROLE, *words[:6], FIRST, *words[6:], SECOND, usage(7, 2), DONE]
    whole = b"".join(sent)
    half = whole.index(words[6])
    pieces = {"each": sent, "one": [whole], "two": [whole[:half], whole[half:]]}[reads]
    async with FakeEngine(fake.pieces(pieces)) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == whole.replace(usage(7, 2), b"")


async def test_each_choice_gets_the_fingerprint(gateway: Any) -> None:
    """The first stream of an engine tells what it is: too late for a choice that ended early."""
    sent = [ROLE, FIRST, token("b"), SECOND, with_print(usage(7, 2)), DONE]
    async with FakeEngine(fake.pieces(sent)) as engine, gateway(engine) as running:
        for early in (FIRST, with_print(FIRST)):
            answer = await ask(running.port, "/v1/chat/completions", CHAT)
            assert answer.body == ROLE + early + token("b") + with_print(SECOND) + DONE


async def test_an_engine_that_counts_in_every_event_keeps_its_last_one(gateway: Any) -> None:
    counted = event(json.loads(finish()[6:]) | {"usage": {"prompt_tokens": 7, "completion_tokens": 1}})
    sent = [ROLE, token("a"), counted, usage(7, 1), DONE]  # --enable-force-include-usage
    async with FakeEngine(fake.pieces(sent)) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body == b"".join(sent)


@pytest.mark.parametrize("then", ["end", "reset"])
async def test_an_end_without_the_usage_event_loses_no_event(gateway: Any, then: str) -> None:
    sent = [ROLE, token("a"), finish()]
    async with FakeEngine(fake.pieces(sent, then=then)) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.body.startswith(b"".join(sent) + b'data: {"error":')
    async with FakeEngine(fake.pieces([*sent, DONE])) as engine, gateway(engine) as running:
        assert (await ask(running.port, "/v1/chat/completions", CHAT)).body == b"".join([*sent, DONE])


def ending(text: str, reason: str) -> bytes:
    return event({"choices": [{"finish_reason": reason, "index": 0, "delta": {"content": text}}]})


@pytest.mark.parametrize(
    ("ordinary", "last", "outcome"),
    [
        ({"choices": [{"text": "hello"}]}, event({"error": [{"m": "boom boom boom"}]}), "in_band_error"),
        ({"choices": [{"finish_reason": None, "delta": {"content": "one"}}]}, ending("x", "abort"), "abort"),
    ],
)
async def test_what_ends_a_stream_is_seen_where_events_say_so_before_their_text(
    gateway: Any, ordinary: dict[str, Any], last: bytes, outcome: str
) -> None:
    """As no vLLM does: its events say behind their text that they are no end."""
    sent = [event(ordinary)] * 6 + [last, DONE]
    async with FakeEngine(fake.pieces(sent)) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome=outcome) == 1
