"""The short way of ordinary token events, below parsing and framing.

Proves: what comes out is what the long way gives, byte for byte, whatever an engine sends and however it is
cut into reads and chunks; framing stays valid, and only whole events go out at any moment; tokens, usage,
ends and failures are accounted for alike; only events that differ in their text alone have a template, and
nothing that ends, fails or counts can pass as one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.deadlines import Limits
from vllm_gateway.routing.pick import Hint
from vllm_gateway.routing.table import Endpoint, Model
from vllm_gateway.settings import Timeouts
from vllm_gateway.telemetry import Gaps
from vllm_gateway.upstream.attempt import Call, Upstream
from vllm_gateway.upstream.client import Connection
from vllm_gateway.upstream.http1 import Heads, parse_head
from vllm_gateway.upstream.sse import last_event_end
from vllm_gateway.upstream.template import Template, Templates
from vllm_gateway.web.channel import Flow, Headers, Message
from vllm_gateway.web.chat import MAX_EVENT_BYTES, ChatStream
from vllm_gateway.web.dialect import StreamDialect
from vllm_gateway.web.openai import OpenAIStream
from vllm_gateway.web.relay import Stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(document: object, *, ascii_only: bool = False) -> bytes:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=ascii_only)
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


def chunk_of(delta: dict[str, Any], reason: str | None = None, **more: object) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    own = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    return {**own, "model": "m", "choices": [choice], **more}


def token(text: str, **more: Any) -> dict[str, object]:
    return chunk_of({"content": text}, **more)


ROLE = event(chunk_of({"role": "assistant", "content": ""}))
FINISH = event(chunk_of({"content": ""}, "stop"))
USAGE = event({"id": "1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
DONE = b"data: [DONE]\n\n"

TEXTS = st.text(alphabet=' ab"\\\n\té漢😀{}:,', max_size=8) | st.just("x" * 1500)
EVENTS = st.one_of(
    TEXTS.map(lambda text: event(token(text))),
    TEXTS.map(lambda text: event(token(text), ascii_only=True)),
    TEXTS.map(lambda text: event(chunk_of({"reasoning": text}))),
    st.sampled_from(
        [
            b": ping\n\n",
            event(token("a", usage={"completion_tokens": 1})),
            event(token("a") | {"choices": [*token("a")["choices"], *token("b")["choices"]]}),  # type: ignore[misc]
            event(chunk_of({"content": "a"}, "length")),
            event({"error": {"message": "died"}}),
            b'data: {"choices":[{"delta":{"content":"a\n\n',
            b"data: nonsense\r\n\r\n",
            b"event: x\ndata: y\n\n",
        ]
    ),
)


@dataclass
class Recorder:
    """A channel that keeps what it is given, as HTTP/1.1 would carry it."""

    forwards: bool = True
    gone: bool = False
    started: bool = True
    finished: bool = False
    flow: Flow | None = None
    written: list[bytes] = field(default_factory=list)

    def start(self, status: int, headers: Headers, length: int | None) -> None: ...
    def write(self, block: bytes) -> None:
        assert last_event_end(block) == len(block), "half an event went out"
        self.written.append(b"%x\r\n%b\r\n" % (len(block), block))

    def forward(self, chunks: bytes) -> None:
        assert self.forwards
        assert last_event_end(payload_of(chunks)) == len(payload_of(chunks)), "half an event went out"
        self.written.append(chunks)

    def finish(self, block: bytes = b"") -> None:
        if block:
            self.write(block)
        self.finished = True

    def direct(self) -> Callable[[bytes], None] | None:
        return self.forward if self.forwards else None

    def flush(self) -> None: ...
    def abort(self) -> None:
        self.gone = True

    def whole_body(self) -> bytes | None:
        return None

    async def receive(self) -> Message:
        return {}

    def watch(self) -> None: ...
    async def wait(self, done: asyncio.Future[Any]) -> None: ...

    def unread(self) -> int:
        return 0


def payload_of(chunks: bytes) -> bytes:
    """What httptools reads of chunks; fails where their framing is not valid."""
    pieces: list[bytes] = []

    class Reader:
        def on_body(self, data: bytes) -> None:
            pieces.append(data)

    parser = httptools.HttpResponseParser(Reader())
    parser.feed_data(HEAD + chunks)
    return b"".join(pieces)


@dataclass
class Outcome:
    sent: bytes
    outcome: str
    accounted: tuple[object, ...]
    short: int


class Wire(asyncio.Transport):
    """An engine's connection, as far as its protocol may change."""

    def __init__(self, protocol: Connection) -> None:
        super().__init__()
        self.protocol: asyncio.Protocol = protocol
        protocol.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def is_closing(self) -> bool:
        return True


class LongWay:
    """The stream as a sink that counts the reads which came to it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.reads = 0
        self.failed = stream.failed

    def data(self, payload: bytes) -> None:
        self.reads += 1
        self._stream.data(payload)

    def end(self, payload: bytes) -> None:
        self.reads += 1
        self._stream.end(payload)


async def relayed(
    reads: list[bytes],
    dialect: StreamDialect,
    templates: Templates | None = None,
    *,
    tap: bool,
    forwards: bool = True,
) -> Outcome:
    loop = asyncio.get_running_loop()
    connection, channel = Connection(loop, Heads()), Recorder(forwards=forwards)
    wire, head = Wire(connection), parse_head(HEAD)
    connection._body = head.framing()
    call = Call("m", "/x", lambda _: b"", {}, "id", 1.0, first_token=True, hint=Hint())
    model, endpoint = Model("m", "m"), Endpoint("e", "h", 1)
    upstream = Upstream(call, model, endpoint, connection, loop.time(), lambda: None)
    stream = Stream(
        channel,
        upstream,
        dialect,
        Gaps(),
        Templates() if templates is None else templates,
        Timeouts(),
        Limits(),
    )
    sink = LongWay(stream)
    connection.start(sink, stream.tokens if tap else None)
    for read in reads:
        wire.protocol.data_received(read)
    assert wire.protocol is connection or not dialect.account.done
    wire.protocol.connection_lost(None)
    stream.close()
    short = len(reads) - sink.reads
    account = dialect.account
    completion = account.completion_tokens or account.token_events
    accounted = (account.prompt_tokens, completion, account.finish_reason, account.failure)
    return Outcome(payload_of(b"".join(channel.written)), stream.outcome, (*accounted, account.done), short)


def framed(events: list[bytes], cuts: list[int]) -> list[bytes]:
    """The events as chunks: one each, as vLLM sends them, but where `cuts` says otherwise."""
    whole = b"".join(events)
    ends = set(itertools.accumulate(map(len, events)))
    for cut in cuts:
        ends ^= {cut % (len(whole) + 1)}
    at = sorted(ends | {0, len(whole)})
    return [b"%x\r\n%b\r\n" % (end - start, whole[start:end]) for start, end in itertools.pairwise(at)]


def as_reads(chunks: list[bytes], joints: list[int], points: list[int]) -> list[bytes]:
    """One read a chunk, but that the chunks of `joints` come with the next one, and that `points` cut."""
    whole = b"".join(chunks)
    ends = list(itertools.accumulate(map(len, chunks)))
    joined = {ends[joint % len(ends)] for joint in joints}
    at = sorted({0, len(whole), *(set(ends) - joined), *(point % (len(whole) + 1) for point in points)})
    return [whole[start:end] for start, end in itertools.pairwise(at)]


DIALECTS: dict[str, Callable[[], StreamDialect]] = {
    "openai": lambda: OpenAIStream(strip_usage=False),
    "openai, usage taken out": lambda: OpenAIStream(strip_usage=True),
    "chat": lambda: ChatStream("m"),
}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@given(
    st.lists(EVENTS, max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=3),
    st.lists(st.integers(3, 20), max_size=5),
    st.lists(st.integers(0, 10_000), max_size=4),
)
async def test_any_split_of_any_stream_gives_the_same_bytes_by_both_ways(
    dialect: Callable[[], StreamDialect],
    events: list[bytes],
    ends: bool,
    cuts: list[int],
    joints: list[int],
    points: list[int],
) -> None:
    first = [ROLE, event(token("a")), event(token("b"))]
    whole = [*first, *events, FINISH, USAGE, *([DONE] if ends else [])]
    reads = as_reads([*framed(whole, cuts), *([b"0\r\n\r\n"] if ends else [])], joints, points)
    long = await relayed(reads, dialect(), tap=False)
    templates = Templates()
    for _ in ("first", "another, by what the first one showed"):
        short = await relayed(reads, dialect(), templates, tap=True)
        assert short.sent == long.sent
        assert (short.outcome, short.accounted) == (long.outcome, long.accounted)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
async def test_the_ordinary_stream_takes_the_short_way(dialect: Callable[[], StreamDialect]) -> None:
    events = [ROLE, *(event(token(f" {number}")) for number in range(50)), FINISH, USAGE, DONE]
    reads = [b"%x\r\n%b\r\n" % (len(one), one) for one in events]
    outcome = await relayed([*reads, b"0\r\n\r\n"], dialect(), tap=True)
    assert outcome.short == 49
    assert outcome.outcome == "complete"
    assert outcome.sent.count(b" 49") == 1


async def test_events_are_not_passed_on_with_a_framing_that_the_caller_does_not_have() -> None:
    events = [ROLE, *(event(token("a")) for _ in range(5)), DONE]
    reads = [b"%x\r\n%b\r\n" % (len(one), one) for one in events]
    outcome = await relayed(reads, OpenAIStream(strip_usage=True), tap=True, forwards=False)
    assert outcome.short == 0
    assert outcome.sent == b"".join(events)


@pytest.mark.parametrize(
    "document",
    [
        chunk_of({"role": "assistant", "content": "a"}),
        chunk_of({"content": "a"}, "stop"),
        token("a", usage={"completion_tokens": 1}),
        token("a", error={"message": "x"}),
        chunk_of({"content": "a", "reasoning": "b"}),
        chunk_of({"content": "a", "tool_calls": []}),
        {"choices": [*token("a")["choices"], *token("b")["choices"]]},  # type: ignore[misc]
        {"choices": []},
        {"content": "a"},
        {"choices": [{"delta": {"content": None}}]},
        {"other": {"content": "a"}, "choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"delta": [], "text": "a"}]},
        [1],
    ],
)
def test_what_is_more_than_a_text_has_no_template(document: object) -> None:
    assert Templates().learn(event(document)) is None


@pytest.mark.parametrize(
    "raw", [b": ping\n\n", DONE, b'data: {"content":"\n\n', b'data: {"choices":[{"text":"a"}]}\r\n\r\n']
)
def test_what_is_no_event_of_one_line_of_json_has_none(raw: bytes) -> None:
    assert Templates().learn(raw) is None


def ordinary() -> Template:
    template = Templates().learn(event(token("a")))
    assert template is not None
    return template


OWN = st.fixed_dictionaries(
    {
        "id": st.from_regex(r"[\w.\-]{0,8}\Z", fullmatch=True) | st.sampled_from(['"', "é", "\\", "a b"]),
        "object": st.sampled_from(["chat.completion.chunk", "text_completion", '"']),
        "created": st.sampled_from([0, 1, 1790000000, -1, 1.5, None, "1"]),
    }
)


@given(st.lists(st.tuples(OWN, EVENTS), min_size=2, max_size=12))
def test_what_was_learnt_of_other_streams_never_changes_what_a_template_is(
    streams: list[tuple[dict[str, Any], bytes]],
) -> None:
    templates = Templates()
    for own, raw in streams:
        usual = b'"id":"chatcmpl-1","object":"chat.completion.chunk","created":1'
        one = raw.replace(usual, json.dumps(own, separators=(",", ":")).encode()[1:-1])
        assert templates.learn(one) == Templates().learn(one)


def test_the_streams_of_an_engine_have_one_shape() -> None:
    templates = Templates()
    for number in range(100):
        own = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 17900 + number}
        template = templates.learn(event({**own, "model": "m", "choices": token("a")["choices"]}))
        assert template is not None
        assert b"chatcmpl-%d" % number in template.prefix
    assert len(templates) == 1


def test_few_shapes_are_kept_however_many_there_are() -> None:
    templates = Templates()
    for number in range(10_000):
        own = {"id": "x", "object": "y", "created": 1, "model": str(number)}
        assert templates.learn(event(own | {"choices": token("a")["choices"]})) is not None
    assert len(templates) <= 256


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"5",
        b"zz\r\n",
        b"+a\r\n",
        b"0\r\n\r\n",
        b"1000\r\n",
        *(
            b"%x\r\n%b\r\n" % (len(one), one)
            for one in (
                FINISH,
                USAGE,
                DONE,
                event({"error": {"message": "x"}}),
                event(token("a", usage={"completion_tokens": 1})),
                event(token('"')),
                event(token("a\\")),
                event(token("a")).replace(b'"a"', b'"a\n\ndata: [DONE]\n\n"'),
            )
        ),
        b"%x;x=y\r\n%b\r\n" % (len(event(token("a"))), event(token("a"))),
        b"%X\r\n%b\r\n" % (len(event(token("a"))), event(token("a")))
        if b"%X" % len(event(token("a"))) != b"%x" % len(event(token("a")))
        else b"0%x\r\n%b\r\n" % (len(event(token("a"))), event(token("a"))),
        b"%x\r\n%b" % (len(event(token("a"))), event(token("a"))),
        b"%x\r\n%b\r\n" % (len(event(token("a"))) + 1, event(token("a"))),
    ],
)
def test_nothing_else_passes_as_a_token(chunk: bytes) -> None:
    good = b"%x\r\n%b\r\n" % (len(event(token("ok"))), event(token("ok")))
    assert ordinary().scan(chunk) == (0, [])
    assert ordinary().scan(good + chunk) == (len(good), [b"ok"])


@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_tokens_of_the_chat_api_are_json_in_ascii_and_small(texts: list[str]) -> None:
    insides = [json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in texts]
    block = ChatStream("m").rewrite("content", insides)
    events = [json.loads(part[6:]) for part in block.split(b"\n\n")[:-1]]
    assert block.isascii()
    assert all(len(part) + 2 <= MAX_EVENT_BYTES for part in block.split(b"\n\n"))
    assert "".join(event["token"] for event in events) == "".join(texts)


@given(st.binary(max_size=20))
def test_no_inside_of_a_string_makes_anything_but_events_of_json(inside: bytes) -> None:
    block = ChatStream("m").rewrite("reasoning", [inside])
    assert all(set(json.loads(part[6:])) == {"reasoning"} for part in block.split(b"\n\n")[:-1])
