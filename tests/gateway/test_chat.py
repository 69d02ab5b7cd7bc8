"""The simple API as its readers see it.

Proves: the example's React hook, ported line by line, shows the whole text and sees the end whatever the
engine does; an event is ASCII, at most 1,200 bytes, and split only between characters; a request that is
not understood names its field; `messages` are a conversation.
"""

from __future__ import annotations

import json
from typing import Any

import engine as fake
import pytest
from engine import DONE, ENGINE_DIED, ROLE, FakeEngine, finish, token, usage
from http_caller import Caller, ask
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.web.chat import MAX_EVENT_BYTES, ChatStream, text_events


class StreamingChat:
    """The hook of the streaming example, with its weaknesses: it parses each read by itself and looks for
    nothing but `done` and `token`. `state` is what the component renders."""

    def __init__(self) -> None:
        self.response = ""
        self.is_streaming = True

    def read(self, value: bytes) -> None:
        chunk = value.decode("utf-8", errors="replace")  # as `new TextDecoder().decode(value)`
        for line in chunk.split("\n\n"):
            if line.startswith("data: "):
                data = json.loads(line[6:])  # throws, and the component stays "streaming" for ever
                if data.get("done"):
                    self.is_streaming = False
                elif data.get("token"):
                    self.response += data["token"]


async def render(port: int, message: str = "hi") -> StreamingChat:
    hook = StreamingChat()
    async with await Caller.connect(port) as caller:
        caller.send("/chat/stream", {"message": message})
        assert (await caller.head()).status == 200
        for chunk in await caller.chunks():  # one read for one write
            hook.read(chunk)
    return hook


async def test_the_examples_hook_shows_the_text_and_sees_the_end(gateway: Any) -> None:
    words = ["Hé", "llo", " 😀", "\n\n", 'data: "x"', "日本", "\u2028"]
    async with FakeEngine(fake.stream(words)) as engine, gateway(engine) as running:
        hook = await render(running.port)
        assert (hook.response, hook.is_streaming) == ("".join(words), False)


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
async def test_the_hook_never_sees_half_an_event_however_the_engine_writes(gateway: Any, size: int) -> None:
    words = ["Hé", "llo 😀", "x" * 3000]
    whole = b"".join([ROLE, *map(token, words), finish(), usage(7, 3), DONE])
    reads = [whole[at : at + size] for at in range(0, len(whole), size)]
    async with FakeEngine(fake.pieces(reads, pause=0)) as engine, gateway(engine) as running:
        hook = await render(running.port)
        assert (hook.response, hook.is_streaming) == ("".join(words), False)


@pytest.mark.parametrize(
    "script",
    [
        fake.pieces([ROLE, token("a"), ENGINE_DIED, DONE]),
        fake.pieces([ROLE, token("a"), finish("abort"), DONE]),
        fake.pieces([ROLE, token("a"), b'data: {"cho'], then="reset"),
        fake.pieces([ROLE, token("a"), b"data: not json\n\n", b'data: "text"\n\n'], then="close"),
    ],
)
async def test_the_hook_sees_the_end_of_a_failed_stream(gateway: Any, script: fake.Script) -> None:
    async with FakeEngine(script) as engine, gateway(engine) as running:
        hook = await render(running.port)
        assert (hook.response, hook.is_streaming) == ("a", False)


async def test_a_preflight_of_the_examples_page_is_allowed(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        asked = {
            "origin": "http://localhost:5173",
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,authorization",
        }
        answer = await ask(running.port, "/chat/stream", method="OPTIONS", headers=asked)
        assert answer.status == 204
        assert not {"content-length", "transfer-encoding"} & answer.headers.keys()  # RFC 9110, 8.6
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "content-type,authorization"
        plain = await ask(running.port, "/chat/stream", method="OPTIONS")  # nobody's preflight
        assert (plain.status, plain.headers["allow"]) == (204, "POST, OPTIONS")
        page = {"origin": "http://localhost:5173"}
        for path in ("/chat/stream", "/chat", "/nothing"):
            answer = await ask(running.port, path, {"message": "x"}, headers=page)
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers


async def test_origins_can_be_closed(gateway: Any) -> None:
    settings = {"cors": {"allowOrigins": ["https://a.example"], "allowCredentials": True}}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            answer = await ask(running.port, "/chat", {"message": "x"}, headers={"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert answer.headers["vary"] == "origin"


async def test_chat_answers_whole(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/chat", {"message": "hi", "temperature": 0, "max_tokens": 5})
        assert answer.json() == {
            "response": "Hello!",
            "model": "m",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }
        asked = engine.seen[0].json()
        assert (asked["temperature"], asked["max_tokens"], asked["stream"]) == (0, 5, False)


async def test_messages_are_the_conversation_before_the_message(gateway: Any) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    async with FakeEngine() as engine, gateway(engine) as running:
        await ask(running.port, "/chat", {"messages": turns, "message": "u"})
        assert engine.seen[0].json()["messages"] == [*turns, {"role": "user", "content": "u"}]
        await ask(running.port, "/chat", {"messages": turns})
        assert engine.seen[1].json()["messages"] == turns


BAD = {
    "nothing said": ({}, None, "message"),
    "unknown key": ({"message": "x", "max_token": 5}, "max_token", "unknown key"),
    "temperature too high": ({"message": "x", "temperature": 3}, "temperature", "less than or equal to 2"),
    "max_tokens is zero": ({"message": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "an unknown role": ({"messages": [{"role": "x", "content": "y"}]}, "messages.0.role", "system"),
}


@pytest.mark.parametrize(("body", "param", "words"), BAD.values(), ids=BAD.keys())
async def test_a_bad_request_names_its_field(
    gateway: Any, body: dict[str, Any], param: str | None, words: str
) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/chat", body)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "code"}
        assert answer.status == 400
        assert words in error["message"]
        assert error["message"].startswith(param or "")


async def test_an_engines_refusal_keeps_its_words_in_this_familys_shape(gateway: Any) -> None:
    words = "This model's maximum context length is 8 tokens."
    refusal = fake.answer(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
    async with FakeEngine(refusal) as engine, gateway(engine) as running:
        for path in ("/chat", "/chat/stream"):
            answer = await ask(running.port, path, {"message": "x"})
            assert answer.status == 400
            assert answer.json() == {
                "error": {"message": words, "type": "invalid_request_error", "code": "invalid_request"}
            }


async def test_reasoning_is_an_event_of_its_own_that_the_hook_ignores(gateway: Any) -> None:
    thought = fake.chat_chunk(delta={"reasoning": "hm"})
    async with (
        FakeEngine(fake.pieces([ROLE, thought, token("a"), DONE])) as engine,
        gateway(engine) as running,
    ):
        answer = await ask(running.port, "/chat/stream", {"message": "x"})
        assert answer.body.startswith(b'data: {"reasoning": "hm"}\n\n')
        assert (await render(running.port)).response == "a"


@given(st.text(min_size=1, max_size=3000))
def test_any_text_is_split_into_small_ascii_events_without_loss(text: str) -> None:
    events = list(text_events("token", text))
    assert all(len(event) <= MAX_EVENT_BYTES and event.isascii() for event in events)
    assert "".join(json.loads(event[6:])["token"] for event in events) == text


@given(st.text(max_size=5000))
def test_an_error_event_is_small_too(message: str) -> None:
    stream = ChatStream("m")
    document = {"error": {"message": message or "x"}}
    event = stream.block(b"data: " + json.dumps(document).encode() + b"\n\n")
    assert len(event) <= MAX_EVENT_BYTES
    assert json.loads(event[6:])["error"]["code"] == "engine_error"


CHUNK_KEYS = ["choices", "delta", "content", "usage", "error", "finish_reason", "message", "reasoning"]
CHUNKS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(CHUNK_KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(CHUNKS)
def test_no_json_of_an_engine_breaks_the_translation(document: Any) -> None:
    stream = ChatStream("m")
    out = stream.block(b"data: " + json.dumps(document).encode() + b"\n\n") + stream.end()
    for part in out.split(b"\n\n"):
        assert part == b"" or json.loads(part.removeprefix(b"data: "))
