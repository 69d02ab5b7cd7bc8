"""LoRA adapters are names of their model.

Proves: `<namespace>/<model>:<adapter>` always means the adapter, its short name only where it was granted;
the engine is asked for the adapter by its own name on every route, the default model included; metrics and
places are the model's; the lists tell whose adapter it is; one that goes while a request waits is a 404.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
from engine import FakeEngine
from http_caller import ask, get

from vllm_gateway.discovery.objects import models_of
from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.envelope import find, prepend, splice
from vllm_gateway.routing.table import Model, Table

SQL = {"model": "m:sql", "messages": [{"role": "user", "content": "hi"}]}


def base(name: str, granted: tuple[str, ...] = (), namespace: str = "ns", **more: Any) -> Model:
    return Model(name, name, namespace, adapters=("sql", "code"), granted_adapters=granted, **more)


def test_the_full_name_always_works_and_the_short_one_if_granted() -> None:
    table = Table.of([base("m", ("sql",))])
    for name in ("sql", "ns/m:sql"):
        (found,) = table.resolve(name)
        assert (found.key, found.upstream_name, found.adapter) == ("ns/m", "sql", "sql")
    assert table.resolve("ns/m:code")[0].upstream_name == "code"
    assert table.resolve("ns/m")[0].upstream_name == "m"
    for name in ("code", "m:sql", "ns/m:", "ns/m:other"):
        with pytest.raises(GatewayError) as caught:
            table.resolve(name)
        assert caught.value.status == 404
    assert table.public_names() == ["ns/m", "ns/m:code", "sql"]


def test_a_models_name_wins_over_an_adapters_and_an_older_model_over_a_younger() -> None:
    named = Model("a", "a", "ns", served_names=("sql",), created=9)
    older = base("m", ("sql", "code"), created=1)
    younger = base("n", ("sql", "code"), namespace="other", created=2)
    table = Table.of([younger, older, named])
    assert [found.key for found in table.resolve("sql")] == ["ns/a"]
    assert [found.key for found in table.resolve("code")] == ["ns/m"]
    assert table.public_names() == [
        *("code", "ns/m", "ns/m:sql", "other/n", "other/n:code", "other/n:sql", "sql")
    ]


def test_models_of_a_namespace_share_an_adapters_name() -> None:
    table = Table.of([base("m", ("sql",), created=1), base("canary", ("sql",), created=2)])
    assert [(found.key, found.upstream_name) for found in table.resolve("sql")] == [
        ("ns/m", "sql"),
        ("ns/canary", "sql"),
    ]


def test_an_adapter_that_goes_while_a_request_waits() -> None:
    waiting = Table.of([base("m", ("sql",))]).resolve("sql")
    assert Table.of([base("m")]).now(waiting, "sql")[0].upstream_name == "sql"
    with pytest.raises(GatewayError, match="has been removed"):
        Table.of([Model("m", "m", "ns")]).now(waiting, "sql")


def test_a_vllmmodel_names_its_adapters_and_its_status_those_that_are_granted() -> None:
    body = {
        "metadata": {"namespace": "ns", "name": "m", "uid": "u"},
        "spec": {"model": "org/m", "adapters": [{"name": "sql", "source": {}}, {"name": "code"}]},
        "status": {"adapters": ["sql", "gone"]},
    }
    (found,) = models_of([body], [])
    assert (found.adapters, found.granted_adapters) == (("sql", "code"), ("sql",))


def test_a_member_can_be_put_into_any_object() -> None:
    for body in (b"{}", b" { } ", b'{"a":1}', b'{ "a":1}'):
        changed = splice(body, [prepend(body, b'"model":"x"')])
        assert json.loads(changed) == {"model": "x", **json.loads(body)}
        assert "model" in find(changed, {"model"}, max_depth=5, max_items=10)


def lora(*adapters: str) -> FakeEngine:
    engine = FakeEngine(families.script())
    engine.adapters = dict.fromkeys(adapters, "m")
    return engine


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize("name", ["sql", "m:sql"])
async def test_the_engine_is_asked_for_the_adapter(gateway: Any, path: str, name: str) -> None:
    async with lora("sql") as engine, gateway(engine) as running:
        body = json.dumps(SQL | {"model": name, "stream": path != "/tokenize"}).encode()
        assert (await ask(running.port, path, body)).status == 200
        asked = engine.seen[0].json()
        assert asked.pop("model") == "sql"
        await running.settled()
        assert running.metric("requests_total", model="m", route=path, code="200") == 1
        assert running.in_flight == 0


async def test_chat_and_forms_know_adapters_too(gateway: Any) -> None:
    async with lora("sql") as engine, gateway(engine) as running:
        answer = await ask(running.port, "/chat", {"message": "hi", "model": "m:sql"})
        assert (answer.json()["model"], engine.seen[0].json()["model"]) == ("m:sql", "sql")
        field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--'
        kind = {"content-type": "multipart/form-data; boundary=b"}
        sent = await ask(running.port, "/v1/audio/transcriptions", field % b"m:sql", headers=kind)
        assert (sent.status, engine.seen[1].body) == (200, field % b"sql")


@pytest.mark.parametrize("body", [{}, {"messages": [], "stream": True}])
async def test_a_default_model_may_be_an_adapter(gateway: Any, body: dict[str, Any]) -> None:
    async with lora("sql") as engine, gateway(engine, options={"defaultModel": "m:sql"}) as running:
        assert (await ask(running.port, "/v1/chat/completions", body)).status == 200
        assert engine.seen[0].json()["model"] == "sql"
        chat = await ask(running.port, "/chat", {"message": "hi"})
        assert (chat.json()["model"], engine.seen[1].json()["model"]) == ("sql", "sql")


async def test_lists_say_whose_adapter_it_is(gateway: Any) -> None:
    async with lora("sql", "code") as engine, gateway(engine) as running:
        listed = (await get(running.port, "/v1/models")).json()["data"]
        assert {item["id"]: item.get("parent") for item in listed} == {"m": None, "sql": "m", "code": "m"}
        assert (await get(running.port, "/v1/models/m:sql")).json()["parent"] == "m"
        (state,) = (await get(running.port, "/models")).json()["models"]
        assert (state["names"], state["adapters"]) == (["m"], ["sql", "code"])


async def test_a_key_for_a_model_covers_its_adapters(gateway: Any, tmp_path: Path) -> None:
    keys = "keys:\n- {name: one, key: sk-one-8f2c6b1d9a, models: [m]}\n"
    keys += "- {name: none, key: sk-none-8f2c6b1d9a, models: [x]}\n"
    (tmp_path / "keys.yaml").write_text(keys)
    options = {"auth": {"keysFile": str(tmp_path)}}
    async with lora("sql") as engine, gateway(engine, options=options) as running:
        for key, status in (("sk-one-8f2c6b1d9a", 200), ("sk-none-8f2c6b1d9a", 403)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await ask(running.port, "/v1/messages", SQL, headers=headers)).status == status
