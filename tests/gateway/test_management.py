"""The management port and what it reports.

Proves: it answers while the request loop is blocked; /livez fails when that loop hangs; /readyz waits for the
API's port; /load has the shape that the operator scales by, and says since when each model is idle; metrics
have bounded labels and count what happened; series of models and keys that are gone go too, some time later;
refusals count the gateway's own codes only; the access log has one line a request, without bodies or keys;
FastAPI's document covers the relayed routes.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine as fake
import pytest
from engine import ROLE, FakeEngine, token
from http_caller import Caller, ask, get
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.app import Gateway, ManagementThread
from vllm_gateway.routing.table import Endpoint, Model, Table
from vllm_gateway.settings import Settings
from vllm_gateway.sockets import bind, port_of
from vllm_gateway.telemetry import GAP_BOUNDS, KEPT_SECONDS, AccessLog, Gaps
from vllm_gateway.web.health import Management, load_report

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def ask_management(running: Any, path: str, method: str = "GET") -> tuple[int, str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Management(running.gateway.services)({"type": "http", "path": path, "method": method}, None, send)  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"].decode()


async def test_the_load_report_counts_requests_by_model_and_pod(gateway: Any) -> None:
    script = fake.forever(token("a"), first=[ROLE])
    async with FakeEngine(script) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            report = load_report(running.gateway.services)
            model = report["models"]["m"]
            assert model == {
                "in_flight": 1,
                "queued": 0,
                "oldest_queued_seconds": 0.0,
                "idle_seconds": 0.0,
                "endpoints": {engine.url: 1},
            }
        await running.settled()
        await asyncio.sleep(0.02)
        report = load_report(running.gateway.services)
        assert report["models"]["m"]["in_flight"] == 0
        assert 0 < report["models"]["m"]["idle_seconds"] < 5
        assert report["draining"] is False
        assert abs(report["started_at"] - time.time()) < 60


async def test_the_load_report_knows_idleness_since_a_model_is_known(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options={"refreshInterval": "1h"}) as running:
        clock = [10_000.0]
        running.gateway.engines.load._clock = lambda: clock[0]
        services = running.gateway.services
        services.lifecycle.started_at -= 100_000  # an old gateway
        here = (Endpoint("e", "127.0.0.1", engine.port),)
        running.gateway.holder.put(Table.of([Model("young", "m", "ns", endpoints=here)]))
        clock[0] += 60
        assert load_report(services)["models"]["ns/young"]["idle_seconds"] == 60
        await ask(running.port, "/v1/embeddings", {"model": "ns/young", "input": "x"})
        clock[0] += 7
        assert load_report(services)["models"]["ns/young"]["idle_seconds"] == 7


async def test_probes_say_what_is_wrong(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        assert await ask_management(running, "/livez") == (200, "ok\n")
        assert await ask_management(running, "/readyz") == (200, "ok\n")
        assert (await ask_management(running, "/nothing"))[0] == 404
        assert (await ask_management(running, "/metrics", "POST"))[0] == 405
        running.gateway.services.lifecycle.draining = True
        assert await ask_management(running, "/readyz") == (503, "draining\n")
        assert (await get(running.port, "/health")).status == 503
    async with gateway(engine) as running:  # the engine is gone
        status, text = await ask_management(running, "/readyz")
        assert status == 503
        assert engine.url in text


async def test_a_gateway_is_not_ready_before_it_listens() -> None:
    """It knows its models a little earlier, and a caller that is sent then would be refused."""
    async with FakeEngine() as engine:
        settings = {"host": "127.0.0.1", "port": 0, "backends": [{"url": engine.url}]}
        gateway = Gateway(Settings.model_validate(settings))
        await gateway.source.start()
        assert gateway.holder().complete
        assert (await ask_management(SimpleNamespace(gateway=gateway), "/readyz")) == (503, "starting\n")
        await gateway.source.stop()


def test_the_management_port_answers_while_the_request_loop_hangs() -> None:
    settings = Settings.model_validate(
        {"host": "127.0.0.1", "managementPort": 0, "backends": [{"url": "http://127.0.0.1:1"}]}
    )
    gateway = Gateway(settings)
    listener = bind("127.0.0.1", 0)
    thread = ManagementThread(gateway.services, listener)
    thread.start()
    try:
        gateway.services.lifecycle.beat = time.monotonic() - 31  # no loop runs here: as if it hung
        port = port_of(listener)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5)
        assert caught.value.code == 503
        caught.value.close()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"vllm_gateway_table_age_seconds" in answer.read()
    finally:
        thread.stop()


async def test_metrics_count_what_happened(gateway: Any) -> None:
    async with FakeEngine(fake.stream(["a"] * 5, delay=0.01)) as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            assert running.metric("in_flight", model="m") == 1
            assert running.metric("connections") == 1
            assert running.metric("endpoints", model="m") == 1
            await caller.chunks()
        await ask(running.port, "/chat", {"message": "x"})
        await running.settled()
        idle = running.gateway.metrics.registry.get_sample_value("vllm_gateway_in_flight", {"model": "m"})
        assert idle == 0
        assert running.metric("requests_total", model="m", route="/v1/chat/completions", code="200") == 1
        assert running.metric("request_duration_seconds_count", model="m", route="/chat") == 1
        assert running.metric("time_to_first_token_seconds_count", model="m") == 1
        assert running.metric("inter_token_seconds_count", model="m") >= 5
        assert 0.03 < running.metric("inter_token_seconds_sum", model="m") < 5
        assert running.metric("tokens_total", model="m", key="anonymous", kind="completion") == 10
        text = (await ask_management(running, "/metrics"))[1]
        assert "# TYPE vllm_gateway_requests_total counter" in text


def models_and_keys(running: Any) -> tuple[set[str], set[str]]:
    running.gateway.services.records.flush()
    samples = [one for found in running.gateway.metrics.registry.collect() for one in found.samples]
    models, keys = ({one.labels.get(label, "") for one in samples} - {""} for label in ("model", "key"))
    return models, keys


async def test_series_of_models_and_keys_that_are_gone_go_too(gateway: Any, tmp_path: Path) -> None:
    """Names come and go for months. What is read last of them must have been scraped; a stream may outlast
    its model; a model that is made again within the time goes on counting.
    """
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: [{name: old, key: sk-old-123456}, {name: new, key: sk-new-123456}]")
    settings = {"refreshInterval": "1h", "auth": {"keysFile": str(keys)}}
    script = fake.in_turn(fake.stream(), fake.stream(), fake.forever(token("a"), first=[ROLE]))
    old, new = {"x-api-key": "sk-old-123456"}, {"x-api-key": "sk-new-123456"}
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        here = (Endpoint("e", "127.0.0.1", engine.port),)
        table = {name: Model(name, "m", endpoints=here) for name in ("kept", "gone", "streams")}
        running.gateway.holder.put(Table.of(table.values()))
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "gone"}, headers=old)
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "kept"}, headers=new)
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "never"}, headers=new)
        async with await Caller.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT | {"model": "streams"}, headers=new)
            await caller.head()
            await caller.chunk()
            everything = {"kept", "gone", "streams", "unknown"}, {"old", "new"}
            assert models_and_keys(running) == everything

            running.gateway.holder.put(Table.of([table["kept"]]))
            keys.write_text("keys: [{name: new, key: sk-new-123456}]")
            running.gateway.keyring._refresh(keys)
            running.gateway.forget_absent(0.0)
            running.gateway.forget_absent(KEPT_SECONDS - 1)
            assert models_and_keys(running) == everything
            running.gateway.holder.put(Table.of([table["kept"], table["gone"]]))
            running.gateway.forget_absent(KEPT_SECONDS - 0.5)  # it is back, and gone again
            running.gateway.holder.put(Table.of([table["kept"]]))
            for now in (0.0, KEPT_SECONDS - 1):
                running.gateway.forget_absent(KEPT_SECONDS + now)
            assert models_and_keys(running) == ({"kept", "gone", "streams", "unknown"}, {"new"})
            running.gateway.forget_absent(2 * KEPT_SECONDS)
            assert models_and_keys(running) == ({"kept", "streams", "unknown"}, {"new"})
        await running.settled()
        running.gateway.forget_absent(3 * KEPT_SECONDS)
        running.gateway.forget_absent(4 * KEPT_SECONDS)
        assert models_and_keys(running) == ({"kept", "unknown"}, {"new"})
        assert running.metric("requests_total", model="kept", route="/v1/chat/completions", code="200") == 1


async def test_tokens_of_a_stream_that_broke_are_counted_by_its_events(gateway: Any) -> None:
    script = fake.pieces([ROLE, *[token("a")] * 4], then="reset")
    async with FakeEngine(script) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT)
        await running.settled()
        assert running.metric("tokens_total", model="m", key="anonymous", kind="completion") == 4


async def test_an_engines_words_are_no_refusals(gateway: Any) -> None:
    words = {"error": {"message": "no", "code": "invented"}}
    async with FakeEngine(fake.answer(400, words)) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT)
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "none"})
        assert running.metric("refusals_total", code="invented") == 0
        assert running.metric("refusals_total", code="model_not_found") == 1


def test_gaps_are_a_histogram() -> None:
    gaps = Gaps()
    for seconds, events in ((0.0005, 1), (0.02, 3), (100.0, 1)):
        gaps.after(seconds, events)
    buckets = dict(gaps.buckets())
    assert buckets["0.001"] == 3  # one gap, and two events that came along with another
    assert (buckets["0.025"], buckets["60.0"], buckets["+Inf"]) == (4, 4, 5)
    assert gaps.total == pytest.approx(100.0205)
    gaps.after(0.02, 0)  # a piece of an event, or one that ends with CRLF
    assert dict(gaps.buckets())["0.001"] == 3
    assert dict(gaps.buckets())["+Inf"] == 6


@given(st.lists(st.one_of(st.sampled_from(GAP_BOUNDS), st.floats(0, 100)), max_size=60))
def test_gaps_counted_together_are_those_counted_one_by_one(seconds: list[float]) -> None:
    together, alone = Gaps(), Gaps()
    for gap in seconds:
        together.add(gap)
        alone.observe(gap)
    assert together.settle() == len(seconds)
    assert together.settle() == 0
    assert together.counts == alone.counts
    assert together.total == pytest.approx(alone.total)


async def test_the_access_log_has_one_line_a_request_and_no_secrets(
    gateway: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        headers = {"authorization": "Bearer s3cret", "x-request-id": "r1"}
        await ask(running.port, "/v1/chat/completions", CHAT, headers=headers)
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "zzz"})
        await running.settled()
    first, second = (line for line in capsys.readouterr().out.splitlines() if "vllm_gateway.access" in line)
    fields = json.loads(first)
    assert fields.pop("seconds") >= 0
    assert fields.pop("time").endswith("Z")
    about = {"level": "info", "logger": "vllm_gateway.access", "message": "request"}
    assert fields == about | {
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "model": "m",
        "status": 200,
        "outcome": "complete",
    }
    assert json.loads(second)["outcome"] == "model_not_found"
    assert not {"s3cret", "hi", "zzz"} & set(second.replace('"', " ").split())


def test_the_access_log_is_text_on_a_terminal_and_silent_above_its_level() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, level="info", as_json=False)
    log.add([(0.5, {"model": "a\nb", "status": 200})])
    log.flush()
    assert not AccessLog(stream, level="warning", as_json=False).on
    line = stream.getvalue()
    assert line == "1970-01-01T00:00:00.500Z INFO    request model=a\\nb status=200\n"
    assert line.count("\n") == 1


def test_a_log_that_nobody_reads_refuses_no_request() -> None:
    stream = io.StringIO()
    stream.close()
    log = AccessLog(stream, level="info", as_json=True)
    log.add([(0.5, {"status": 200})])
    log.flush()


async def test_the_openapi_document_has_every_route(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        document = (await get(running.port, "/openapi.json")).json()
        assert {"/chat", "/chat/stream", "/v1/chat/completions", "/models", "/health"} <= set(
            document["paths"]
        )
        names = set(document["components"]["schemas"])
        assert {"ChatRequest", "ChatResponse", "ChatMessage", "ChatUsage"} <= names
        text = json.dumps(document)
        for part in text.split('"$ref": "#/components/schemas/')[1:]:
            assert part.split('"')[0] in names
        assert (await get(running.port, "/docs")).status == 200


async def test_one_model_can_be_asked_for(gateway: Any) -> None:
    async with FakeEngine(models=["org/name"]) as engine, gateway(engine) as running:
        assert (await get(running.port, "/v1/models/org/name")).json()["id"] == "org/name"
        assert (await get(running.port, "/v1/models/other")).status == 404
        listed = (await get(running.port, "/v1/models")).json()
        assert listed["data"][0] == {
            "id": "org/name",
            "object": "model",
            "created": 1,
            "owned_by": "vllm-fleet",
        }
