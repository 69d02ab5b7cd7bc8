"""Everything from outside has a limit and a clear answer with the right status (FACTS E13, E14, E15, E16).

Proves that what is refused never reaches an engine, over both channels; and, for the channel that ships,
that heads and trailers are limited too (uvicorn's parser limits nothing), and that a trailer is no header.
What it costs a process is test_abuse.py's.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from engine import DONE, FakeEngine
from http_caller import Answer, Caller, ask, get

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
LIMITS = {
    "limits": {"bodyBytes": 20_000, "bodyTimeout": "200ms", "jsonItems": 1000, "headerTimeout": "200ms"}
}

BAD_BODIES = {
    "not JSON": (b"hello", "invalid_json"),
    "empty": (b"", "invalid_json"),
    "a list": (b"[]", "invalid_json"),
    "cut off": (b'{"model": "m"', "invalid_json"),
    "something after it": (b'{"model": "m"} x', "invalid_json"),
    "UTF-16": (json.dumps(CHAT).encode("utf-16"), "invalid_json"),
    "UTF-16 without a mark": (json.dumps(CHAT).encode("utf-16-le"), "invalid_json"),
    "model twice": (b'{"model": "m", "model": "n", "messages": []}', "invalid_request"),
    "model twice, once escaped": (b'{"model": "m", "mod\\u0065l": "n"}', "invalid_request"),
    "stream twice": (b'{"model": "m", "stream": true, "stream": false}', "invalid_request"),
    "stream_options twice": (
        b'{"model": "m", "stream_options": {}, "stream_options": {}}',
        "invalid_request",
    ),
    "model is no string": (b'{"model": 5}', "invalid_request"),
    "model is too long": (b'{"model": "%s"}' % (b"x" * 300), "invalid_request"),
    "stream is no boolean": (b'{"model": "m", "stream": "yes"}', "invalid_request"),
    "stream is a number": (b'{"model": "m", "stream": 1}', "invalid_request"),
    "too deep": (b'{"model": "m", "x": ' + b"[" * 150 + b"]" * 150 + b"}", "json_too_deep"),
    "too many items": (b'{"model": "m", "x": [' + b"[]," * 2000 + b"1]}", "json_too_large"),
}


@pytest.mark.parametrize(("body", "code"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_e13_a_bad_body_is_a_400_that_says_why(gateway: Any, body: bytes, code: str) -> None:
    async with FakeEngine() as engine, gateway(engine, options=LIMITS) as running:
        answer = await ask(running.port, "/v1/chat/completions", body)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["type"]) == (400, code, "invalid_request_error")
        assert error["message"]
        assert not engine.seen


async def test_e13_a_hundred_thousand_levels_are_refused_quickly(gateway: Any) -> None:
    deep = b'{"model": "m", "x": ' + b"[" * 100_000
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", deep)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "json_too_deep")
        answer = await ask(running.port, "/chat", b'{"message": ' + b"[" * 100_000)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "json_too_deep")


async def test_e13_a_declared_body_over_the_limit_is_a_413_before_it_is_sent(gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine, options=LIMITS) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", headers={"content-length": "500000000", "expect": "100-continue"})
        answer = await caller.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"


async def test_e13_a_body_without_a_length_is_cut_at_the_limit_and_memory_stays_flat(gateway: Any) -> None:
    tracemalloc.start()
    async with FakeEngine() as engine, gateway(engine, options=LIMITS) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat", headers={"content-length": "", "transfer-encoding": "chunked"})
            answering = asyncio.ensure_future(caller.answer())
            block = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
            for _ in range(200):
                if answering.done():
                    break
                caller.raw(block)
                try:
                    await caller.writer.drain()
                except ConnectionError:
                    break
            answer = await answering
            assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert not engine.seen
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16_000_000


async def test_e13_a_body_that_trickles_in_is_a_408(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=LIMITS) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat", headers={"content-length": "1000"})
            answering = asyncio.ensure_future(caller.answer())
            while not answering.done():  # each byte comes well within the limit, all of them do not
                caller.raw(b"{")
                await asyncio.wait((answering,), timeout=0.05)
            answer = await answering
            assert (answer.status, answer.json()["error"]["code"]) == (408, "body_too_slow")
        await running.settled()
        assert not engine.seen


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"content-type": ""}, {"content-encoding": "gzip"}]
)
async def test_another_type_than_json_is_a_415(gateway: Any, headers: dict[str, str]) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT, headers=headers)
        assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert not engine.seen


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1/chat/completions%2f..%2f..%2finvocations",
        "/v1/chat/completions/../../metrics",
        "/v1/chat/completions/batch",
        "/v1/load_lora_adapter",
        "/invocations",
        "/metrics",
        "/scale_elastic_ep",
        "/V1/chat/completions",
    ],
)
async def test_e14_only_the_exact_routes_lead_to_an_engine(gateway: Any, path: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, path, CHAT)
        assert answer.status == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert not engine.seen


async def test_a_query_does_not_reach_the_engine(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        assert (await ask(running.port, "/v1/chat/completions?api-version=1", CHAT)).status == 200
        assert engine.seen[0].path == "/v1/chat/completions"


async def test_another_method_is_a_405_with_allow(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        for path in ("/chat", "/v1/chat/completions"):
            answer = await get(running.port, path)
            assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
        answer = await ask(running.port, "/models", {})
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]


async def test_e15_credentials_cookies_and_control_headers_stop_at_the_gateway(gateway: Any) -> None:
    sent = {
        "authorization": "Bearer secret",
        "cookie": "session=1",
        "proxy-authorization": "Basic x",
        "connection": "keep-alive, x-foo",
        "x-foo": "1",
        "te": "trailers",
        "endpoint-load-metrics-format": "json",
        "x-data-parallel-rank": "1",
        "accept-encoding": "gzip",
        "x-forwarded-for": "10.0.0.1",
        "user-agent": "me/1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    async with FakeEngine() as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT, headers=sent)
        seen = engine.seen[0].headers
        assert set(seen) == {
            "host", "content-type", "content-length", "x-request-id", "user-agent", "traceparent"
        }  # fmt: skip
        assert seen["host"] == f"127.0.0.1:{engine.port}"


@pytest.mark.parametrize("given", ["x" * 129, "a b", "ü", ""])
async def test_a_request_id_that_is_not_plain_is_replaced(gateway: Any, given: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT, headers={"x-request-id": given})
        identity = answer.headers["x-request-id"]
        assert identity != given
        assert len(identity) == 32
        assert engine.seen[0].headers["x-request-id"] == identity


async def test_e16_any_number_of_model_names_and_paths_is_one_label(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            for number in range(300):
                caller.send("/v1/chat/completions", CHAT | {"model": f"random-{number}"})
                answer = await caller.answer()
                assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
                caller.send(f"/random/{number}", CHAT)
                assert (await caller.answer()).status == 404
        await running.settled()
        names = _labels(running)
        assert names == {("unknown", "/v1/chat/completions"), ("unknown", "other")}


def _labels(running: Any) -> set[tuple[str, str]]:
    samples = (sample for metric in running.gateway.metrics.registry.collect() for sample in metric.samples)
    return {(item.labels["model"], item.labels["route"]) for item in samples if "route" in item.labels}


async def test_an_unknown_model_is_a_404_that_lists_what_is_served(gateway: Any) -> None:
    async with FakeEngine(models=["a", "b"]) as engine, gateway(engine) as running:
        for path in ("/v1/chat/completions", "/chat", "/chat/stream"):
            answer = await ask(
                running.port, path, {"model": "c", "message": "x"} if "v1" not in path else CHAT
            )
            assert answer.status == 404
            assert "Models served here: a, b." in answer.json()["error"]["message"]


async def test_a_request_without_a_model_gets_the_only_one_or_a_400_that_lists_them(gateway: Any) -> None:
    body = {"messages": [], "stream": True}
    async with FakeEngine() as engine, gateway(engine) as running:
        assert (await ask(running.port, "/v1/chat/completions", body)).body.endswith(DONE)
    async with FakeEngine(models=["a", "b"]) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", body)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "model")
        assert "a, b" in answer.json()["error"]["message"]
    settings = {"defaultModel": "b"}
    async with FakeEngine(models=["a", "b"]) as engine, gateway(engine, options=settings) as running:
        assert (await ask(running.port, "/chat", {"message": "x"})).json()["model"] == "b"


# The channel that ships: heads.


async def refused(port: int, wire: bytes) -> Answer:
    async with await Caller.connect(port) as caller:
        caller.raw(wire)
        return await caller.answer()


HEAD = b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BAD_HEADS = {
    "too many headers": (HEAD + b"x: y\r\n" * 5000 + b"\r\n", 431),
    "too large a header": (HEAD + b"x: " + b"y" * 40_000 + b"\r\n\r\n", 431),
    "a header without end": (HEAD + b"x: " + b"y" * 2_000_000, 431),
    "too long a path": (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414),
    "a path without end": (b"GET /" + b"x" * 2_000_000, 414),
    "length and chunks": (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    "two lengths": (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
    "a space before the colon": (HEAD + b"transfer-encoding : chunked\r\n\r\n", 400),
    "a folded header": (HEAD + b"x: y\r\n z\r\n\r\n", 400),
    "a NUL": (HEAD + b"x: \x00\r\n\r\n", 400),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, 400),
    "a head that trickles in": (HEAD, 408),
}


@pytest.mark.parametrize(("wire", "status"), BAD_HEADS.values(), ids=BAD_HEADS.keys())
async def test_e14_a_bad_head_is_refused_and_the_connection_closed(
    raw_gateway: Any, wire: bytes, status: int
) -> None:
    async with FakeEngine() as engine, raw_gateway(engine, options=LIMITS) as running:
        answer = await refused(running.port, wire)
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["message"]
        assert not engine.seen


async def test_a_connection_on_which_nothing_comes_is_closed(raw_gateway: Any) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=LIMITS) as running,
        await Caller.connect(running.port) as caller,
    ):
        assert await asyncio.wait_for(caller.reader.read(), 2) == b""


CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    b"x-request-id: of-the-head\r\ntransfer-encoding: chunked\r\n\r\n"
)


async def test_e15_a_trailer_never_passes_as_a_header(raw_gateway: Any) -> None:
    """A proxy in front that checks or sets headers does not look there."""
    body = json.dumps(CHAT).encode()
    wire = b"%b%x\r\n%b\r\n0\r\nx-request-id: of-a-trailer\r\n\r\n" % (CHUNKED, len(body), body)
    async with (
        FakeEngine() as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.raw(wire)
        answer = await caller.answer()
        assert (answer.status, answer.headers["x-request-id"]) == (200, "of-the-head")
        assert engine.seen[0].headers["x-request-id"] == "of-the-head"


@pytest.mark.parametrize("line", [b"x: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["many", "one"])
async def test_e14_trailers_without_end_are_refused(raw_gateway: Any, line: bytes) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.raw(CHUNKED + b"1\r\n{\r\n0\r\nx: ")
        for _ in range(100):
            caller.raw(line)
            await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            assert (await caller.answer()).status == 431
        await running.settled()
        assert not engine.seen
