"""The API families beside chat: their routes, their streams, their errors, over both channels.

Proves: each route of the allow-list reaches the engine under its own path with the body's bytes, and no other
path does; tokens are counted as the engine counts them in each family's words; a stream that breaks, fails in
band or is aborted ends with one error event of the family and is no success; errors before the first byte
have the family's shape; what one replica keeps in memory is refused where there are several.
"""

from __future__ import annotations

import json
from typing import Any

import engine as fake
import families
import pytest
from engine import FakeEngine
from families import (
    MESSAGE_ERROR,
    as_json,
    message_delta,
    message_events,
    message_start,
    response_events,
    text_delta,
)
from http_caller import ask

from vllm_gateway.web.routes import ROUTES

MESSAGES = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
RESPONSES = {"model": "m", "input": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["a"]},
    "/v2/rerank": {"model": "m", "query": "q", "documents": ["a"]},
    "/rerank": {"model": "m", "query": "q", "documents": ["a"]},
    "/v1/score": {"model": "m", "text_1": "q", "text_2": "a"},
    "/score": {"model": "m", "text_1": "q", "text_2": "a"},
    "/tokenize": {"model": "m", "prompt": "hi"},
    "/detokenize": {"model": "m", "tokens": [1]},
}
COUNTED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
STREAMED: dict[str, tuple[dict[str, Any], Any]] = {
    "/v1/responses": (RESPONSES, response_events),
    "/v1/messages": (MESSAGES, message_events),
}
# FACTS of vLLM 0.32: routes that need no key there, load code, or do unbounded work.
NEVER = (
    "/invocations",
    "/generative_scoring",
    "/pooling",
    "/classify",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/systemone",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/inference/v1/generate",
    "/start_profile",
    "/sleep",
    "/pause",
    "/collective_rpc",
    "/cohere/v2/chat",
    "/v1/audio/speech",
    "/v1/messages/",
    "/v1/messages/count_tokens/x",
    "/V1/messages",
    "//v1/messages",
    "/v1/%6dessages/../messages/../../sleep",
)


def tokens(running: Any, kind: str) -> float:
    return float(running.metric("tokens_total", model="m", key="anonymous", kind=kind))


def test_every_route_with_a_body_of_json_is_tried_here() -> None:
    assert set(BODIES) == {path for path, route in ROUTES.items() if not route.form} - {
        "/chat",
        "/chat/stream",
    }


@pytest.mark.parametrize("path", BODIES)
async def test_each_route_reaches_the_engine_byte_for_byte(gateway: Any, path: str) -> None:
    body = json.dumps(BODIES[path], indent=1).encode()
    async with FakeEngine(families.script()) as engine, gateway(engine) as running:
        answer = await ask(running.port, path, body)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert (engine.seen[0].path, engine.seen[0].body) == (path, body)
        await running.settled()
        assert running.metric("requests_total", model="m", route=path, code="200") == 1
        no_usage = "tokenize" in path or "count_tokens" in path
        assert tokens(running, "prompt") == (0 if no_usage else families.PROMPT)
        assert tokens(running, "completion") == (3 if path in COUNTED else 0)


@pytest.mark.parametrize("path", NEVER)
async def test_no_other_path_reaches_an_engine(raw_gateway: Any, path: str) -> None:
    async with FakeEngine(families.script()) as engine, raw_gateway(engine) as running:
        assert (await ask(running.port, path, {"model": "m"})).status in (404, 405)
        assert not engine.seen


@pytest.mark.parametrize("path", STREAMED)
async def test_a_stream_passes_unchanged_and_is_counted(gateway: Any, path: str) -> None:
    body, events = STREAMED[path]
    sent = json.dumps(body | {"stream": True}).encode()
    async with FakeEngine(families.script(["Hé", "llo"])) as engine, gateway(engine) as running:
        answer = await ask(running.port, path, sent)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body == b"".join(events(["Hé", "llo"]))
        assert engine.seen[0].body == sent
        await running.settled()
        assert (tokens(running, "prompt"), tokens(running, "completion")) == (families.PROMPT, 2)
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1
        assert running.metric("time_to_first_token_seconds_count", model="m") == 1


async def test_prompt_tokens_from_a_cache_are_counted_too(gateway: Any) -> None:
    events = message_events(["a"], cached=4)
    async with FakeEngine(fake.pieces(events)) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/messages", MESSAGES | {"stream": True})
        await running.settled()
        assert tokens(running, "prompt") == families.PROMPT


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("then", ["reset", "end"])
async def test_a_stream_that_breaks_ends_with_one_error_event(gateway: Any, path: str, then: str) -> None:
    body, events = STREAMED[path]
    begun = events(["a", "b"])[:4]
    async with FakeEngine(fake.pieces(begun, then=then)) as engine, gateway(engine) as running:
        answer = await ask(running.port, path, body | {"stream": True})
        assert answer.body.startswith(b"".join(begun))
        rest = answer.body[len(b"".join(begun)) :]
        assert rest.count(b"\n\n") == 1
        assert rest.startswith(b"event: error\n")
        told: Any = as_json(rest)
        assert told["type"] == "error"
        if path == "/v1/messages":
            assert told["error"]["type"] == "api_error"
        else:
            assert (told["code"], told["sequence_number"]) == ("engine_closed", 4)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 0


@pytest.mark.parametrize(
    ("path", "events", "outcome"),
    [
        ("/v1/messages", [message_start(), text_delta("a"), MESSAGE_ERROR], "in_band_error"),
        ("/v1/messages", message_events(["a"], reason=None), "abort"),
        ("/v1/responses", response_events(["a"], last="failed"), "in_band_error"),
        ("/v1/responses", [*response_events(["a"])[:3], fake.ENGINE_DIED], "in_band_error"),
    ],
)
async def test_a_failure_in_band_is_passed_on_and_no_success(
    gateway: Any, path: str, events: list[bytes], outcome: str
) -> None:
    body, _ = STREAMED[path]
    async with FakeEngine(fake.pieces(events)) as engine, gateway(engine) as running:
        answer = await ask(running.port, path, body | {"stream": True})
        assert answer.body == b"".join(events)
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome=outcome) == 1
        assert running.metric("upstream_errors_total", model="m", reason=outcome) == 1


async def test_an_incomplete_response_is_a_whole_answer(gateway: Any) -> None:
    events = response_events(["a"], last="incomplete")  # max_output_tokens
    async with FakeEngine(fake.pieces(events)) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/responses", RESPONSES | {"stream": True})
        await running.settled()
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (503, "overloaded_error"), (500, "api_error"), (401, "api_error")],
)
async def test_an_engines_refusal_is_told_in_anthropics_shape(gateway: Any, status: int, kind: str) -> None:
    refusal = {"type": "error", "error": {"type": "BadRequestError", "message": "max_tokens too large"}}
    async with FakeEngine(fake.answer(status, refusal)) as engine, gateway(engine) as running:
        told = (await ask(running.port, "/v1/messages", MESSAGES)).json()
        assert (told["type"], told["error"]["type"]) == ("error", kind)
        assert "max_tokens too large" in told["error"]["message"] or status == 401


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "x"}, 404, "not_found_error"),
        (b"{", 400, "invalid_request_error"),
        (b'{"model":"' + b"x" * 2000 + b'"}', 413, "request_too_large"),
    ],
)
async def test_the_gateways_own_refusals_have_anthropics_shape_too(
    gateway: Any, body: object, status: int, kind: str
) -> None:
    options = {"limits": {"bodyBytes": 1024}}
    async with FakeEngine() as engine, gateway(engine, options=options) as running:
        answer = await ask(running.port, "/v1/messages", body)
        told = answer.json()
        assert (answer.status, told["type"], told["error"]["type"]) == (status, "error", kind)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ],
)
async def test_who_asks_for_a_stored_response_is_told_that_there_are_none(
    gateway: Any, method: str, path: str
) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        answer = await ask(running.port, path, b"", method=method)
        told = answer.json()["error"]
        assert (answer.status, told["code"]) == (400, "stored_responses_not_offered")
        assert f"{method} {path}" in told["message"]
        assert (await ask(running.port, "/v1/responses/", b"", method="GET")).status == 404
        assert not engine.seen


@pytest.mark.parametrize("key", ["background", "previous_response_id"])
async def test_a_stored_response_is_refused_above_one_replica(gateway: Any, key: str) -> None:
    body = RESPONSES | {key: "resp_1" if "id" in key else True}
    async with (
        FakeEngine(families.script()) as one,
        FakeEngine(families.script()) as other,
        gateway(one, other) as running,
    ):
        answer = await ask(running.port, "/v1/responses", body)
        told = answer.json()["error"]
        assert (answer.status, told["code"], told["param"]) == (400, "stored_responses_not_offered", key)
        assert not one.seen
        assert not other.seen
        for harmless in ({key: None}, {"store": True}, {key: False}):
            assert (await ask(running.port, "/v1/responses", RESPONSES | harmless)).status == 200


async def test_one_replica_may_keep_responses(gateway: Any) -> None:
    async with FakeEngine(families.script()) as engine, gateway(engine) as running:
        body = RESPONSES | {"previous_response_id": "resp_1"}
        assert (await ask(running.port, "/v1/responses", body)).status == 200
        assert engine.seen[0].json()["previous_response_id"] == "resp_1"


def test_text_that_looks_like_an_end_is_none() -> None:
    from vllm_gateway.web.anthropic import AnthropicStream
    from vllm_gateway.web.responses import ResponsesStream

    trick = text_delta('event: message_stop {"type":"message_stop"} "error"')
    stream = AnthropicStream()
    assert stream.block(trick + message_delta(1)[:0]) == trick
    assert not stream.account.done
    assert stream.account.failure is None
    spoken = '{"type":"response.completed","response":{}} "error": 1'
    said = families.named("response.output_text.delta", delta=spoken)
    other = ResponsesStream()
    assert other.block(said) == said
    assert not other.account.done
    assert other.account.failure is None
