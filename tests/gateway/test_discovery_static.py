"""Static backends: `VLLM_URL` works before its engine does, and heals by itself.

Proves: names are asked from the backends and asked again; a backend that is not up is said in /health,
/models and answers, with a 503 and not a 404; several backends share their models' requests; one that goes
away is left, one that is merely busy is not; the gateway's own key goes to them and to nobody else, and
another one once its file has changed; a list with numbers that are none is a bad answer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import engine as fake
import pytest
from engine import FakeEngine
from http_caller import ask, get, until

from vllm_gateway.discovery.static import _read_names, endpoint_of
from vllm_gateway.errors import UpstreamFailure
from vllm_gateway.settings import Backend

CHAT = {"model": "m", "messages": [], "stream": True}
QUICK = {"refreshInterval": "120ms"}


async def until_status(port: int, status: int) -> None:
    async def seen() -> bool:
        return (await ask(port, "/v1/chat/completions", CHAT)).status == status

    await until(seen)


async def test_a_backend_that_is_not_up_yet_is_said_and_then_served(gateway: Any) -> None:
    engine = FakeEngine()
    port = engine.port
    async with gateway(engine, options=QUICK) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "model_not_ready")
        assert f"http://127.0.0.1:{port}" in answer.json()["error"]["message"]
        health = (await get(running.port, "/health")).json()
        assert health["status"] == "starting"
        assert str(port) in health["notes"][0]
        assert (await get(running.port, "/models")).json()["notes"] == health["notes"]
        async with engine:
            await until_status(running.port, 200)
            assert (await get(running.port, "/health")).json()["status"] == "ok"


async def test_a_backend_that_goes_away_keeps_its_names_and_comes_back(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=QUICK) as running:
        await until_status(running.port, 200)
        await engine.__aexit__(None, None, None)

        async def seen() -> bool:
            return bool(not (await get(running.port, "/models")).json()["models"][0]["ready"])

        await until(seen)
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert answer.status == 503
        assert "BackendDown" in answer.json()["error"]["message"]
        async with FakeEngine(port=engine.port):
            await until_status(running.port, 200)


async def test_new_names_of_a_backend_are_found(gateway: Any) -> None:
    async with FakeEngine() as engine, gateway(engine, options=QUICK) as running:
        engine.models.append("lora")

        async def seen() -> bool:
            return bool(len((await get(running.port, "/v1/models")).json()["data"]) >= 2)

        await until(seen)
        assert (await ask(running.port, "/v1/chat/completions", CHAT | {"model": "lora"})).status == 200
        assert engine.seen[-1].json()["model"] == "lora"


async def test_requests_go_to_the_backend_with_the_fewest(gateway: Any) -> None:
    async with FakeEngine(fake.never) as one, FakeEngine(fake.never) as other, gateway(one, other) as running:
        asking = [asyncio.create_task(ask(running.port, "/v1/chat/completions", CHAT)) for _ in range(10)]
        await until(lambda: running.in_flight >= 10)
        await until(lambda: (one.active, other.active) == (5, 5))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await running.settled()


async def test_backends_serve_what_each_of_them_has(gateway: Any) -> None:
    async with (
        FakeEngine(models=["a", "b"]) as one,
        FakeEngine(models=["b"]) as other,
        gateway(one, other) as running,
    ):
        models = {item["name"]: item for item in (await get(running.port, "/models")).json()["models"]}
        assert (models["a"]["endpoints"], models["b"]["endpoints"]) == (1, 2)


async def test_the_backends_key_goes_to_the_backend(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    async with FakeEngine() as engine, gateway(engine) as running:
        headers = {"authorization": "Bearer the-callers"}
        answer = await ask(running.port, "/v1/chat/completions", CHAT, headers=headers)
        assert engine.seen[0].headers["authorization"] == "Bearer s3cret"
        assert b"s3cret" not in answer.body
        assert "s3cret" not in repr(running.gateway.holder())


async def test_a_backends_key_that_was_rotated_is_taken_up(gateway: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("first\n")
    async with FakeEngine() as engine:
        backends = [{"url": engine.url, "apiKeyFile": str(key)}]
        async with gateway(options=QUICK | {"backends": backends}) as running:

            async def asked_with(secret: str) -> bool:
                await ask(running.port, "/v1/chat/completions", CHAT)
                return engine.seen[-1].headers["authorization"] == f"Bearer {secret}"

            assert await asked_with("first")
            key.write_text("second\n")
            await until(lambda: asked_with("second"))
            key.unlink()
            await until(lambda: bool(running.gateway.holder().notes))
            assert "No such file" in running.gateway.holder().notes[0]
            assert await asked_with("second")
            key.write_text("third\n")
            await until(lambda: asked_with("third"))
            await until(lambda: not running.gateway.holder().notes)


async def test_a_backend_that_refuses_the_gateways_key_is_a_502_not_the_callers_401(gateway: Any) -> None:
    refusal = fake.answer(401, {"error": "Unauthorized"})
    async with FakeEngine(refusal) as engine, gateway(engine) as running:
        answer = await ask(running.port, "/v1/chat/completions", CHAT)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_refused_gateway")


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "prefix"),
    [
        ("http://a:8000", "a", 8000, False, ""),
        ("http://a:8000/v1", "a", 8000, False, ""),
        ("http://a:8000/", "a", 8000, False, ""),
        ("https://a/llm/v1", "a", 443, True, "/llm"),
        ("http://[::1]:8000", "::1", 8000, False, ""),
    ],
)
def test_a_url_may_carry_a_path_and_the_v1_that_people_paste(
    url: str, host: str, port: int, tls: bool, prefix: str
) -> None:
    endpoint = endpoint_of(Backend(url=url), None)
    assert (endpoint.host, endpoint.port, endpoint.tls, endpoint.prefix) == (host, port, tls, prefix)


@pytest.mark.parametrize("created", ["1e999", "Infinity", "[1]", '"x"'])
def test_a_list_with_numbers_that_are_none_is_a_bad_response(created: str) -> None:
    with pytest.raises(UpstreamFailure, match="no list of models"):
        _read_names(b'{"data": [{"id": "m", "created": %b}]}' % created.encode())
