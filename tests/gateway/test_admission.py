"""Who may call, and how much, over real sockets and both channels.

Proves:
- without a key, or with a wrong one, every route but /health and the documents is a 401 in its family's
  shape, before the body is read and before an engine hears of it; both key headers work;
- a key sees and uses its own models only, also those that come later: 403 for another's, and no list names
  one that it may not use;
- /health stays open, and names no model to those who could not call;
- requests, tokens and requests at once of a key are limited: 429 with Retry-After, also for /models; a stream
  whose caller leaves gives its permit back;
- tokens are counted by key, streamed or not; a key stands in no log line, its name does;
- keys change without a restart, and running streams go on;
- of a table that is not in force any more nothing is kept, however many keys have looked at it;
- ten thousand refused requests leave memory as it was.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import engine as fake
import pytest
from engine import ROLE, FakeEngine, token
from http_caller import Answer, Caller, ask, get, until

from vllm_gateway.routing.table import Endpoint, Model, Table

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
UNARY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ALICE, BOB = {"authorization": "Bearer sk-alice-123456"}, {"x-api-key": "sk-bob-12345678"}
EVERY = [
    ("/v1/chat/completions", CHAT),
    ("/v1/embeddings", {"model": "m", "input": "x"}),
    ("/chat", {"message": "hi"}),
    ("/chat/stream", {"message": "hi"}),
]


def options(tmp_path: Path, alice: str = "", bob: str = "", **auth: Any) -> dict[str, Any]:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"keys:\n- {{name: alice, key: sk-alice-123456{alice}}}\n- {{name: bob, key: sk-bob-12345678{bob}}}\n"
    )
    return {"auth": {"keysFile": str(path), **auth}, "refreshInterval": "1h"}


def refused(answer: Answer, status: int, code: str) -> dict[str, Any]:
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    if status == 429:
        assert int(answer.headers["retry-after"]) >= 1
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("headers", "code"),
    [({}, "missing_api_key"), ({"authorization": "Bearer sk-wrong-123456"}, "invalid_api_key")],
)
async def test_without_a_good_key_nothing_happens(
    gateway: Any, tmp_path: Path, headers: dict[str, str], code: str
) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options(tmp_path)) as running:
        for path, body in EVERY:
            error = refused(await ask(running.port, path, body, headers=headers), 401, code)
            assert error["type"] == "authentication_error"
            assert ("param" in error) is path.startswith("/v1")
        for path in ("/models", "/v1/models", "/v1/models/m", "/nothing"):
            refused(await get(running.port, path, **headers), 401, code)
        assert engine.seen == []
        await running.settled()


async def test_a_key_is_looked_at_before_the_body_is_read(gateway: Any, tmp_path: Path) -> None:
    async with (
        FakeEngine() as engine,
        gateway(engine, options=options(tmp_path)) as running,
        await Caller.connect(running.port) as caller,
    ):
        caller.send("/v1/chat/completions", headers={"content-length": "1000000"})
        assert (await caller.head()).status == 401


@pytest.mark.parametrize("headers", [ALICE, BOB])
async def test_both_ways_to_send_a_key(gateway: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options(tmp_path)) as running:
        for path, body in EVERY:
            assert (await ask(running.port, path, body, headers=headers)).status == 200
        assert (await get(running.port, "/v1/models", **headers)).status == 200
        assert all("authorization" not in seen.headers for seen in engine.seen)
        assert all("x-api-key" not in seen.headers for seen in engine.seen)


async def test_anonymous_callers_where_they_are_allowed(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, allowAnonymous=True)
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        assert (await ask(running.port, "/chat", {"message": "hi"})).status == 200
        wrong = {"x-api-key": "sk-wrong-123456"}
        refused(await ask(running.port, "/chat", {"message": "hi"}, headers=wrong), 401, "invalid_api_key")


async def test_a_key_sees_and_uses_its_own_models_only(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, alice=", models: [a/*]", bob=", models: [chat]")
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        here = (Endpoint("e", "127.0.0.1", engine.port),)
        running.gateway.holder.put(
            Table.of(
                [
                    Model("one", "m", "a", ("first",), here),
                    Model("two", "m", "b", ("chat",), here),
                    Model("three", "m", "c", ("secret",), here),
                ]
            )
        )
        for name, headers, status in (
            ("first", ALICE, 200),
            ("a/one", ALICE, 200),
            ("chat", ALICE, 403),
            ("b/two", ALICE, 403),
            ("chat", BOB, 200),
            ("b/two", BOB, 200),
            ("a/one", BOB, 403),
            ("none", ALICE, 404),
        ):
            answer = await ask(running.port, "/v1/chat/completions", UNARY | {"model": name}, headers=headers)
            assert answer.status == status, name
            if status != 200:
                message = answer.json()["error"]["message"]
                assert "secret" not in message
                assert ("first" in message) is (headers is ALICE)
        assert [item["id"] for item in (await get(running.port, "/v1/models", **ALICE)).json()["data"]] == [
            "first"
        ]
        assert [item["name"] for item in (await get(running.port, "/models", **BOB)).json()["models"]] == [
            "b/two"
        ]
        refused(await get(running.port, "/v1/models/secret", **ALICE), 403, "model_not_allowed")
        running.gateway.holder.put(Table.of([Model("four", "m", "a", ("new",), here)]))
        listed = (await get(running.port, "/v1/models", **ALICE)).json()["data"]
        assert [item["id"] for item in listed] == ["new"]


async def test_no_former_table_is_kept_for_keys_that_do_not_come_back(gateway: Any, tmp_path: Path) -> None:
    """Each pod that becomes ready makes a new table, of all models."""
    keys = "".join(f"- {{name: k{n}, key: sk-key-{n:06}, models: ['a/*']}}\n" for n in range(100))
    (tmp_path / "keys.yaml").write_text(f"keys:\n{keys}")
    settings = {"auth": {"keysFile": str(tmp_path / "keys.yaml")}, "refreshInterval": "1h"}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        before = tables()
        for number in range(100):
            running.gateway.holder.put(Table.of([Model("one", "m", "a"), Model("two", "m", "b")]))
            await get(running.port, "/models", x_api_key=f"sk-key-{number:06}")
        assert tables() - before < 10


def tables() -> int:
    gc.collect()
    return sum(type(found) is Table for found in gc.get_objects())


async def test_without_a_name_the_only_model_that_the_key_may_use(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, bob=", models: [chat]")
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        here = (Endpoint("e", "127.0.0.1", engine.port),)
        models = [Model("one", "m", "a", ("first",), here), Model("two", "m", "b", ("chat",), here)]
        running.gateway.holder.put(Table.of(models))
        refused(await ask(running.port, "/chat", {"message": "x"}, headers=ALICE), 400, "invalid_request")
        assert (await ask(running.port, "/chat", {"message": "x"}, headers=BOB)).json()["model"] == "chat"


async def test_health_is_open_and_names_nothing_to_strangers(gateway: Any, tmp_path: Path) -> None:
    async with FakeEngine() as engine, gateway(engine, options=options(tmp_path)) as running:
        stranger, alice = await get(running.port, "/health"), await get(running.port, "/health", **ALICE)
        assert (stranger.status, stranger.json()["status"], stranger.json()["models"]) == (200, "ok", [])
        assert [model["name"] for model in alice.json()["models"]] == ["m"]
        assert (await get(running.port, "/openapi.json")).status == 200


async def test_requests_a_minute(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, alice=", limits: {requestsPerMinute: 3}")
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        assert (await get(running.port, "/models", **ALICE)).status == 200
        for path in ("/chat", "/chat/stream"):
            assert (await ask(running.port, path, {"message": "x"}, headers=ALICE)).status == 200
        for path, body in EVERY:
            error = refused(await ask(running.port, path, body, headers=ALICE), 429, "rate_limit_exceeded")
            assert "'alice'" in error["message"]
        refused(await get(running.port, "/models", **ALICE), 429, "rate_limit_exceeded")
        assert running.metric("refusals_total", code="rate_limit_exceeded") == len(EVERY) + 1
        assert (await ask(running.port, "/chat", {"message": "x"}, headers=BOB)).status == 200
        assert len(engine.seen) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat", "/chat/stream"])
async def test_tokens_a_minute(gateway: Any, tmp_path: Path, path: str) -> None:
    """The fake engine counts 7 tokens of prompt and 3 of completion."""
    settings = options(tmp_path, alice=", limits: {tokensPerMinute: 15}")
    body = CHAT if path.startswith("/v1") else {"message": "x"}
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        for _ in range(2):
            assert (await ask(running.port, path, body, headers=ALICE)).status == 200
        error = refused(await ask(running.port, path, body, headers=ALICE), 429, "rate_limit_exceeded")
        assert "15 tokens" in error["message"]
        assert running.metric("tokens_total", model="m", key="alice", kind="prompt") == 14
        assert running.metric("tokens_total", model="m", key="alice", kind="completion") == 6


async def test_requests_at_once_come_back_however_they_end(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, alice=", limits: {concurrency: 1}")
    script = fake.in_turn(
        fake.forever(token("a"), first=[ROLE]), fake.answer(400, {"error": {}}), fake.stream()
    )
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat/stream", {"message": "x"}, headers=ALICE)
            await caller.head()
            await caller.chunk()
            answer = await ask(running.port, "/chat", {"message": "x"}, headers=ALICE)
            refused(answer, 429, "rate_limit_exceeded")
            caller.reset()
        await running.settled()
        assert (await ask(running.port, "/chat", {"message": "x"}, headers=ALICE)).status == 400
        assert (await ask(running.port, "/chat", b"{", headers=ALICE)).status == 400
        assert (await ask(running.port, "/chat", {"message": "x"}, headers=ALICE)).status == 200
        await running.settled()
        await until(lambda: engine.active == 0)


async def test_a_refused_request_holds_no_permit_while_its_body_is_awaited(
    gateway: Any, tmp_path: Path
) -> None:
    settings = options(tmp_path, alice=", limits: {concurrency: 1}")
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        async with await Caller.connect(running.port) as caller:
            half = {"content-type": "text/plain", "content-length": "1000"}
            caller.send("/chat", b"x" * 500, headers=ALICE | half)
            await until(lambda: running.server.server_state.tasks)
            await until(lambda: not running.permits)
            assert running.server.server_state.tasks  # it is still under way
            assert (await ask(running.port, "/chat", {"message": "x"}, headers=ALICE)).status == 200
            assert (await caller.answer()).status == 415
        await running.settled()


async def test_a_key_stands_in_no_log_line(
    gateway: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = options(tmp_path, bob=", limits: {requestsPerMinute: 1}")
    async with FakeEngine() as engine, gateway(engine, options=settings) as running:
        await ask(running.port, "/chat", {"message": "x"}, headers=ALICE)
        await ask(running.port, "/chat", {"message": "x"}, headers=BOB)
        await ask(running.port, "/chat", {"message": "x"}, headers=BOB)
        await ask(running.port, "/chat", {"message": "x"}, headers={"x-api-key": "sk-wrong-123456"})
        await running.settled()
    written = capsys.readouterr().out
    access = [json.loads(line) for line in written.splitlines()]
    assert [(item.get("key"), item["status"]) for item in access] == [
        ("alice", 200),
        ("bob", 200),
        ("bob", 429),
        (None, 401),
    ]
    told = json.dumps([[record.getMessage(), getattr(record, "fields", {})] for record in caplog.records])
    assert "sk-" not in written + told


async def test_keys_change_without_a_restart(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path)
    script = fake.forever(token("a"), first=[ROLE])
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        await running.gateway.keyring.stop()
        running.gateway.keyring._poll = 0.01
        await running.gateway.keyring.start()
        async with await Caller.connect(running.port) as caller:
            caller.send("/chat/stream", {"message": "x"}, headers=ALICE)
            await caller.head()
            (tmp_path / "keys.yaml").write_text("keys: [{name: carol, key: sk-carol-123456}]")
            carol = {"x-api-key": "sk-carol-123456"}

            async def known() -> bool:
                return (await get(running.port, "/models", **carol)).status == 200

            await until(known)
            refused(await get(running.port, "/models", **ALICE), 401, "invalid_api_key")
            assert await caller.chunk()
            (tmp_path / "keys.yaml").write_text("keys: [{name: }]")
            await until(lambda: running.metric("key_file_failed") == 1)
            assert await known()
        await running.settled()


async def test_ten_thousand_refusals_leave_nothing_behind(gateway: Any, tmp_path: Path) -> None:
    settings = options(tmp_path, bob=", limits: {requestsPerMinute: 1}")
    async with (
        FakeEngine() as engine,
        gateway(engine, options=settings) as running,
        await Caller.connect(running.port) as caller,
    ):

        async def refuse(times: int) -> None:
            for batch in range(0, times, 20):  # pipelined, for the time that it takes
                for number in range(batch, batch + 20):
                    headers = BOB if number % 2 else {"x-api-key": f"sk-guess-{number:08}"}
                    caller.send("/chat", {"message": "x"}, headers=headers)
                for _ in range(20):
                    assert (await caller.answer()).status in (200, 401, 429)
            running.gateway.services.records.flush()  # the last ones wait for a moment to be told

        begun = time.monotonic() // 60  # the minutes of the gateway's clock
        await refuse(100)
        before = objects()
        await refuse(10_000)
        assert objects() - before < 200
        await running.settled()
        minutes = time.monotonic() // 60 - begun + 1  # a slow machine may take more than the one
        assert 1 <= len(engine.seen) <= minutes


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())
