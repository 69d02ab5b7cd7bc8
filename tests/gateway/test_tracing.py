"""Traces, received by a collector that speaks OTLP over HTTP.

Proves: a request is one span under its caller's, and the engine's parent is that span; without a caller's
trace a new one begins, and what is no trace context is not passed on; names, tokens, statuses and failures
stand in it under OpenTelemetry's names, and no text does; a caller's decision not to sample holds; a
collector that is away costs a request nothing; off, nothing of OpenTelemetry's SDK is imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import engine as fake
import pytest
from engine import ROLE, FakeEngine, token
from http_caller import ask
from otlp_collector import OtlpCollector, Received

from vllm_gateway.settings import BadSettings, load

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "my secret"}], "stream": True}
SERVER = 2


def traced(collector: OtlpCollector) -> dict[str, Any]:
    return {"tracing": {"endpoint": collector.url}}


def one(collector: OtlpCollector) -> Received:
    """The only span; the gateway sends what is left when it stops."""
    (span,) = collector.spans
    return span


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_one_span_between_caller_and_engine(gateway: Any, stream: bool) -> None:
    async with OtlpCollector() as collector, FakeEngine() as engine:
        async with gateway(engine, options=traced(collector)) as running:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
            body = CHAT | {"stream": stream}
            assert (await ask(running.port, "/v1/chat/completions", body, headers=headers)).status == 200
            await running.settled()
        span = one(collector)
        assert (span.trace_id, span.parent_id, span.kind) == (TRACE, PARENT, SERVER)
        assert engine.seen[0].headers["traceparent"] == f"00-{TRACE}-{span.span_id}-01"
        assert engine.seen[0].headers["tracestate"] == "vendor=x"
        assert span.name == "chat m"
        assert span.resource["service.name"] == "vllm-gateway"
        told = dict(span.attributes)
        assert told.pop("vllm_gateway.request_id")
        assert told == {
            "gen_ai.provider.name": "vllm",
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "m",
            "gen_ai.usage.input_tokens": 7,
            "gen_ai.usage.output_tokens": 3,
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
        }
        assert not span.error
        assert "secret" not in repr(span)


@pytest.mark.parametrize("given", [None, "nonsense", "00-" + "0" * 32 + "-" + PARENT + "-01"])
async def test_a_new_trace_begins_where_the_caller_has_none(gateway: Any, given: str | None) -> None:
    async with OtlpCollector() as collector, FakeEngine() as engine:
        async with gateway(engine, options=traced(collector)) as running:
            headers = {"traceparent": given} if given else {}
            await ask(running.port, "/chat", {"message": "hi"}, headers=headers)
            await running.settled()
        span = one(collector)
        assert span.parent_id == ""
        passed_on = engine.seen[0].headers["traceparent"]
        assert passed_on[:-2] == f"00-{span.trace_id}-{span.span_id}-"
        assert int(passed_on[-2:], 16) & 1  # sampled; the other bit says that the id is random


@pytest.mark.parametrize(
    ("body", "status", "kind", "error"),
    [
        (CHAT | {"model": "x"}, 404, "model_not_found", False),
        (CHAT, 200, "reset", True),
    ],
)
async def test_failures_are_told(gateway: Any, body: object, status: int, kind: str, error: bool) -> None:
    script = fake.pieces([ROLE, token("a")], then="reset")
    async with OtlpCollector() as collector, FakeEngine(script) as engine:
        async with gateway(engine, options=traced(collector)) as running:
            await ask(running.port, "/v1/chat/completions", body)
            await running.settled()
        span = one(collector)
        assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (status, kind)
        assert span.error == error


async def test_a_caller_that_does_not_sample_is_obeyed(gateway: Any) -> None:
    async with OtlpCollector() as collector, FakeEngine() as engine:
        async with gateway(engine, options=traced(collector)) as running:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            await ask(running.port, "/v1/chat/completions", CHAT, headers=headers)
            await running.settled()
        assert engine.seen[0].headers["traceparent"].startswith(f"00-{TRACE}-")
        assert engine.seen[0].headers["traceparent"].endswith("-00")
        assert not collector.spans


async def test_a_collector_that_is_away_costs_nothing(raw_gateway: Any) -> None:
    async with OtlpCollector() as collector:
        options = traced(collector)
    async with FakeEngine() as engine, raw_gateway(engine, options=options) as running:
        assert (await ask(running.port, "/v1/chat/completions", CHAT)).status == 200
        await running.settled()


def test_off_nothing_is_imported() -> None:
    code = (
        "import sys, vllm_gateway.app as app; from vllm_gateway.settings import load;"
        "app.Gateway(load(None, {'backends': [{'url': 'http://x'}]}));"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://user:secret@host/v1/traces", ""])
def test_a_wrong_endpoint_is_one_line(tmp_path: Path, endpoint: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"tracing: {{endpoint: '{endpoint}'}}")
    with pytest.raises(BadSettings, match=r"tracing\.endpoint"):
        load(str(file), {})
