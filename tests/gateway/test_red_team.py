"""What an attacker would try, one after the other; each is tried, each is refused.

Proves: keys cannot be guessed by parts, digests or other places; a request smuggled into another never runs;
no spelling of a path leads past the allow-list; media URLs and adapters fetch nothing (on vLLM's own code:
tests/e2e/test_5_media.py); a model's owner opens none of this; a model cannot be
taken over from another namespace, nor by a Service or a slice; a log line cannot be forged; names, paths and
methods do not flood the metrics; nobody reads another's cached answer. Over a real socket, on both channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from engine import FakeEngine, Reply, event
from http_caller import Answer, Caller, ask, get
from vllm_models import model_body

from vllm_gateway.discovery.objects import models_of
from vllm_gateway.routing.table import Table
from vllm_gateway.telemetry import LineFormatter
from vllm_operator.api.parsing import parse
from vllm_operator.errors import SpecError
from vllm_operator.fleet import Fleet
from vllm_operator.render import render
from vllm_operator.settings import Settings as OperatorSettings

SECRET = "sk-alice-0123456789"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BODY = json.dumps(CHAT).encode()


def locked(tmp_path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    (tmp_path / "keys.yaml").write_text(f"keys: [{{name: alice, sha256: {digest}}}]")
    return {"auth": {"keysFile": str(tmp_path / "keys.yaml")}}


# Keys

GUESSES: dict[str, dict[str, str]] = {
    "a part of it": {"authorization": f"Bearer {SECRET[:-1]}"},
    "a longer one": {"authorization": f"Bearer {SECRET}0"},
    "other case": {"authorization": f"Bearer {SECRET.upper()}"},
    "its digest": {"authorization": f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}"},
    "its owner's name": {"authorization": "Bearer alice"},
    "another scheme": {"authorization": f"Basic {SECRET}"},
    "no scheme": {"authorization": SECRET},
    "a cookie": {"cookie": f"key={SECRET}"},
    "a proxy's header": {"proxy-authorization": f"Bearer {SECRET}"},
    "somebody else's word": {"x-forwarded-user": "alice", "x-authenticated": "true"},
    "half a megabyte": {"x-api-key": "x" * 20_000},
    "nothing": {"authorization": "Bearer  ", "x-api-key": " "},
}


@pytest.mark.parametrize("headers", GUESSES.values(), ids=GUESSES.keys())
async def test_a_key_cannot_be_guessed(gateway: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    async with FakeEngine() as engine, gateway(engine, options=locked(tmp_path)) as running:
        answer = await ask(running.port, f"/v1/chat/completions?api_key={SECRET}", CHAT, headers=headers)
        assert answer.status == 401
        assert SECRET not in answer.body.decode()
        assert engine.seen == []
        good = {"authorization": f"Bearer {SECRET}"}
        assert (await ask(running.port, "/v1/chat/completions", CHAT, headers=good)).status == 200


# Smuggling

START = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
INNER = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = {
    "length, then chunks": START
    + b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n" % len(CHUNKED)
    + CHUNKED
    + INNER,
    "chunks, then length": START
    + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n"
    + CHUNKED
    + INNER,
    "two lengths": START
    + b"content-length: %d\r\ncontent-length: %d\r\n\r\n" % (len(BODY), len(BODY + INNER))
    + BODY
    + INNER,
    "a space before the colon": START + b"transfer-encoding : chunked\r\n\r\n" + CHUNKED + INNER,
    "an unknown coding": START + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKED + INNER,
    "chunked twice": START + b"transfer-encoding: chunked, chunked\r\n\r\n" + CHUNKED + INNER,
    "a folded header": START + b"x: y\r\n transfer-encoding: chunked\r\n\r\n" + CHUNKED + INNER,
    "a bare line feed": START.replace(b"\r\n", b"\n") + b"content-length: 5\n\n" + INNER,
    "a signed length": START + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY + INNER,
    "a length in hexadecimal": START + b"content-length: 0x%x\r\n\r\n" % len(BODY) + BODY + INNER,
    "a chunk size out of range": START
    + b"transfer-encoding: chunked\r\n\r\n1%015x\r\n" % len(BODY)
    + BODY
    + INNER,
    "a NUL in a name": START + b"content-length\x00: 5\r\n\r\n" + INNER,
}


@pytest.mark.parametrize("wire", SMUGGLED.values(), ids=SMUGGLED.keys())
async def test_a_request_inside_another_never_runs(gateway: Any, wire: bytes) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        async with await Caller.connect(running.port) as caller:
            caller.raw(wire)
            caller.writer.write_eof()
            said = await caller.reader.read()
        await running.settled()
        assert said.count(b"HTTP/1.1 200") == 0, said
        assert [seen.path for seen in engine.seen if seen.path.startswith("/v1/embeddings")] == []


@pytest.mark.parametrize("header", ["x-request-id", "traceparent", "user-agent"])
async def test_a_forwarded_header_cannot_carry_another(gateway: Any, header: str) -> None:
    for value in (b"a\rx-injected: 1", b"a\x0bx-injected: 1", b"a\x00x-injected: 1"):
        wire = START + header.encode() + b": " + value + b"\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
        async with FakeEngine() as engine, gateway(engine) as running:
            async with await Caller.connect(running.port) as caller:
                caller.raw(wire)
                caller.writer.write_eof()
                await caller.reader.read()
            assert not [seen for seen in engine.seen if "x-injected" in str(seen.headers)]


# Paths

PATHS = [
    "/v1/chat/completions/../../metrics",
    "/v1/%2e%2e/metrics",
    "/v1/chat/completions/..;/load_lora_adapter",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1/chat/completions/",
    "/models/",  # a redirect would go to whatever host the caller names
    "/health/",
    "/v1/chat/completions%00",
    "/v1/chat%2fcompletions",
    "/V1/CHAT/COMPLETIONS",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/invocations",
    "/sleep",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/scale_elastic_ep",
    "/server_info",
    "/start_profile",
    "/v1/chat/completions/batch",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:9090/metrics",
    "*",
]


@pytest.mark.parametrize("path", PATHS)
async def test_no_spelling_of_a_path_leads_past_the_list(gateway: Any, path: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        for method in ("POST", "GET", "PUT", "DELETE"):
            async with await Caller.connect(running.port) as caller:
                caller.send(path, CHAT, method=method)
                answer = await caller.answer()
            assert answer.status in {400, 404, 405}, (method, answer)
        assert [seen.path for seen in engine.seen if seen.path != "/v1/models"] == []


# What the engine could be made to fetch


def test_an_engine_fetches_nothing_that_a_caller_names() -> None:
    manifests = render(parse(model_body()), OperatorSettings())
    deployment = next(body for body in manifests if body["kind"] == "Deployment")
    (engine,) = deployment["spec"]["template"]["spec"]["containers"]
    arguments, variables = engine["args"], {item["name"]: item.get("value") for item in engine["env"]}
    assert arguments[arguments.index("--allowed-media-domains") + 1] == "media.invalid"
    assert variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "--allowed-local-media-path" not in arguments
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables
    assert "VLLM_SERVER_DEV_MODE" not in variables


OWNERS = {
    "a folder": {"extraArgs": ["--allowed-local-media-path", "/"]},
    "a module": {"extraArgs": ["--middleware=evil.Middleware"]},
    "a file of code": {"extraArgs": ["--tool_parser_plugin=/models/evil.py"]},
    "the development mode": {"env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}]},
    "adapters at run time": {"env": [{"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"}]},
    "redirects": {"env": [{"name": "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "value": "1"}]},
    "a profiler": {"extraArgs": ["--profiler-config.profiler", "torch"]},
}


@pytest.mark.parametrize("engine", OWNERS.values(), ids=OWNERS.keys())
def test_a_models_owner_opens_nothing_for_its_callers(engine: dict[str, Any]) -> None:
    """All that is tried, and in more spellings: tests/operator/test_policy.py."""
    with pytest.raises(SpecError, match=r"settings\.policy\.engineOptions"):
        render(parse(model_body(engine=engine)), OperatorSettings())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize(
    "name",
    [
        "http://169.254.169.254/lora",
        "../../etc",
        "evil/lora",
        "m:evil",
        "m:../../etc",
        "m:http://169.254.169.254/",
        "ns/m:evil",
    ],
)
async def test_an_adapter_that_a_caller_names_is_not_fetched(gateway: Any, path: str, name: str) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        reply = await ask(running.port, path, CHAT | {"model": name, "max_tokens": 4})
        assert reply.status == 404
        assert [seen.path for seen in engine.seen if seen.path != "/v1/models"] == []


# Models of others


def held(fleet: Fleet, name: str) -> list[str]:
    return [str(key) for key in fleet.models if name in fleet.granted(key)]


def test_a_name_of_an_older_namespace_is_not_granted_to_another() -> None:
    fleet = Fleet()
    first, thief = model_body("chat", "a"), model_body("other", "b", servedNames=["chat"])
    first["metadata"] |= {"uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    thief["metadata"] |= {"uid": "2", "creationTimestamp": "2026-01-02T00:00:00Z"}
    fleet.replace([thief, first], 1)
    assert held(fleet, "chat") == ["a/chat"]


def test_a_slice_made_by_hand_gets_no_requests() -> None:
    model = {"metadata": {"namespace": "a", "name": "m", "uid": "1"}, "status": {"servedNames": ["m"]}}
    endpoint = {"addresses": ["10.6.6.6"], "targetRef": {"kind": "Pod", "uid": "evil"}}
    labels: dict[str, str] = {
        "kubernetes.io/service-name": "m-engine",
        "vllm-fleet.dev/model": "m",
        "vllm-fleet.dev/model-uid": "1",
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    forged: list[dict[str, Any]] = [
        {"metadata": {"namespace": "a", "labels": labels}},  # nobody owns it
        {
            "metadata": {
                "namespace": "b",
                "labels": labels,
                "ownerReferences": [{"kind": "Service", "controller": True}],
            }
        },
        {
            "metadata": {
                "namespace": "a",
                "labels": labels | {"vllm-fleet.dev/model-uid": "2"},
                "ownerReferences": [{"kind": "Service", "controller": True}],
            }
        },
    ]
    slices = [item | {"ports": [{"name": "http", "port": 1}], "endpoints": [endpoint]} for item in forged]
    table = Table.of(models_of([model], slices))
    assert table.models["a/m"].endpoints == ()


# Logs and metrics


@pytest.mark.parametrize("as_json", [True, False])
async def test_a_log_line_cannot_be_forged(
    gateway: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    options = {"logFormat": "json" if as_json else "text"}
    forged = 'x\n{"level": "info", "key": "alice"}\r\n2026-01-01T00:00:00.000Z INFO forged'
    async with FakeEngine() as engine, gateway(engine, options=options) as running:
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": forged})
        await ask(running.port, "/chat", {"message": "hi", "model": forged})
        await get(running.port, "/v1/models/x%0aforged%0d%0aforged")
        await ask(running.port, "/x%0aforged", CHAT, headers={"user-agent": "a\tforged"})
        await running.settled()
    formatter = LineFormatter(as_json=as_json)
    lines = [formatter.format(record) for record in caplog.records]
    assert not [line for line in lines if re.search(r"[\r\n]", line)]
    written = capsys.readouterr().out.splitlines()
    assert len(written) == 4
    assert all("request" in line and "forged" not in line for line in written)


async def test_an_engine_cannot_forge_a_log_line_either(
    gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    script_error = event({"error": {"message": "boom\nforged line", "type": "x\nforged", "code": 500}})

    async def script(reply: Reply) -> None:
        await reply.head()
        await reply.chunk(script_error)
        await reply.end()

    async with FakeEngine(script) as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT | {"stream": True})
        await running.settled()
    lines = [LineFormatter(as_json=False).format(record) for record in caplog.records]
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("mark", ["\n", "\r", "\x1b[2J", "\u2028", "\x85", "\x00"])
def test_what_ends_a_line_or_moves_a_terminal_is_escaped(as_json: bool, mark: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, f"a{mark}b", None, None)
    record.fields = {"detail": f"c{mark}d"}
    line = LineFormatter(as_json=as_json).format(record)
    assert mark not in line
    assert len(line.splitlines()) == 1


def samples_of(running: Any) -> int:
    running.gateway.services.records.flush()
    return sum(1 for metric in running.gateway.metrics.registry.collect() for _ in metric.samples)


async def test_names_paths_and_methods_do_not_flood_the_metrics(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine) as running:
        await ask(running.port, "/v1/chat/completions", CHAT | {"model": "warm"})
        await get(running.port, "/warm")
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat", CHAT, method="WARM")
            await caller.answer()
        before = samples_of(running)
        async with await Caller.connect(running.port) as caller:
            for number in range(200):
                caller.send("/v1/chat/completions", CHAT | {"model": f"evil-{number}"})
                await caller.answer()
                caller.send(f"/evil-{number}", method="GET")
                await caller.answer()
        assert samples_of(running) == before


# Answers of others


async def test_nobody_reads_anothers_cached_answer(gateway: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(
        "keys:\n- {name: alice, key: sk-alice-123456}\n- {name: eve, key: sk-eve-12345678}\n"
    )
    settings = {
        "auth": {"keysFile": str(tmp_path / "keys.yaml"), "allowAnonymous": True},
        "responseCache": {"ttl": "1m"},
    }
    cold = CHAT | {"temperature": 0}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:

        async def asked(**headers: str) -> Answer:
            return await ask(running.port, "/v1/chat/completions", cold, headers=headers)

        assert (await asked(**{"x-api-key": "sk-alice-123456"})).headers["x-cache"] == "miss"
        assert (await asked(**{"x-api-key": "sk-eve-12345678"})).headers["x-cache"] == "miss"
        assert (await asked()).headers["x-cache"] == "miss"
        spoofed = {"x-cache-key": "alice", "x-api-key": "sk-eve-12345678"}
        assert (await asked(**spoofed)).headers["x-cache"] == "hit"  # her own
        assert (await asked(**{"x-api-key": "sk-alice-123456"})).headers["x-cache"] == "hit"
        assert len(engine.seen) == 3
