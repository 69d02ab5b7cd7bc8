"""The master key that engines' keys are derived from, as the gateway reads it.

Proves: no file, no key; a changed file is taken up; a file that is gone or empty keeps the key that was good
and says so; the key reaches the endpoints of the model's own slices and no `repr`. While the master key
changes: an engine that has not been restarted gets the key from before, which is found out once, and costs
neither a retry nor health; one that is restarted in its pod gets the new one; an engine that takes neither is
a 502; each key goes to its own engine only, and the former one for a day.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import engine as fake
from engine import DONE, FakeEngine
from http_caller import Answer, ask

from vllm_gateway.discovery.engine_keys import MasterKey
from vllm_gateway.routing.table import Endpoint, Model, Table

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PATH = "/v1/chat/completions"


def test_without_a_file_there_is_no_key() -> None:
    assert MasterKey(None).of("ns", "m", "uid") is None


def test_a_key_is_that_of_one_model(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a" * 64 + "\n")
    keys = MasterKey(str(file))
    given = {
        keys.of(*model) for model in (("ns", "m", "1"), ("ns", "m", "2"), ("n", "m", "1"), ("ns", "n", "1"))
    }
    assert len(given) == 4
    assert keys.of("ns", "m", "1") == keys.of("ns", "m", "1")


async def test_a_changed_file_is_taken_up_and_a_bad_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a" * 64)
    keys, news = MasterKey(str(file), poll=0.01), asyncio.Event()
    before = keys.of("ns", "m", "1")
    task = asyncio.create_task(keys.follow(news.set))
    file.unlink()
    async with asyncio.timeout(5):
        while "cannot be read" not in keys.problem:  # noqa: ASYNC110 - what the file's reader says is a state
            await asyncio.sleep(0.01)
    assert keys.of("ns", "m", "1") == before
    assert not news.is_set()
    file.write_text("")
    assert keys.refresh() is False
    assert "empty" in keys.problem
    file.write_text("b" * 64)
    async with asyncio.timeout(5):
        await news.wait()
    assert keys.of("ns", "m", "1") != before
    assert keys.problem == ""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_key_is_not_printed() -> None:
    assert "secret" not in repr(Endpoint("id", "10.0.0.1", 8000, key="secret", former_key="secret"))


def test_the_key_from_before_is_kept_for_a_day(tmp_path: Path) -> None:
    now, file = 0.0, tmp_path / "key"
    file.write_text("a" * 64)
    keys = MasterKey(str(file), clock=lambda: now)
    first = keys.of("ns", "m", "1")
    assert keys.both("ns", "m", "1") == (first, None)
    file.write_text("b" * 64)
    assert keys.refresh()
    assert not keys.refresh()
    assert keys.both("ns", "m", "1") == (keys.of("ns", "m", "1"), first)
    now = 25 * 3600.0
    assert keys.both("ns", "m", "1") == (keys.of("ns", "m", "1"), None)


class Guarded:
    """An engine's script that asks for a key, as vLLM does."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.shown: list[str] = []

    async def __call__(self, reply: fake.Reply) -> None:
        given = reply.request.headers["authorization"].removeprefix("Bearer ")
        self.shown.append(given)
        well = fake.stream() if given == self.key else fake.answer(401, {"error": "Unauthorized"})
        await well(reply)


def guarded(name: str, engine: FakeEngine) -> Endpoint:
    return Endpoint(name, "127.0.0.1", engine.port, key=f"new-{name}", former_key=f"old-{name}")


async def chat(running: Any, model: str = "m") -> Answer:
    return await ask(running.port, PATH, CHAT | {"model": model})


async def test_an_engine_that_still_has_the_old_key_is_found_out_once(gateway: Any) -> None:
    script = Guarded("old-a")
    settings = {"refreshInterval": "1h", "ejection": {"failures": 1}}
    async with FakeEngine(script) as engine, gateway(engine, options=settings) as running:
        table = Table.of([Model("m", "m", endpoints=(guarded("a", engine),))])
        running.gateway.holder.put(table)
        answers = await asyncio.gather(*(chat(running) for _ in range(5)))
        assert all(answer.body.endswith(DONE) for answer in answers)
        script.shown.clear()
        for _ in range(3):
            assert (await chat(running)).status == 200
        assert script.shown == ["old-a"] * 3
        script.key = "new-a"  # its container was restarted, in the same pod
        for _ in range(3):
            assert (await chat(running)).status == 200
        assert script.shown[3:] == ["old-a", "new-a", "new-a", "new-a"]
        await running.settled()
        assert running.metric("retries_total") == 0
        assert not running.gateway.engines.balancer.health._states
        running.gateway.engines.behind.add("a")
        running.gateway.holder.put(Table.of([]))
        assert not running.gateway.engines.behind


async def test_an_engine_that_takes_neither_key_is_a_502_and_asked_twice_at_most(gateway: Any) -> None:
    script = Guarded("another")
    async with FakeEngine(script) as engine, gateway(engine) as running:
        running.gateway.holder.put(Table.of([Model("m", "m", endpoints=(guarded("a", engine),))]))
        answer = await chat(running)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_refused_gateway")
        assert script.shown == ["new-a", "old-a"]


async def test_each_engine_sees_its_own_keys_only(gateway: Any) -> None:
    one, two = Guarded("old-a"), Guarded("none")
    async with FakeEngine(one) as a, FakeEngine(two) as b, gateway(a, b) as running:
        ends = {"a": guarded("a", a), "b": guarded("b", b)}
        running.gateway.holder.put(
            Table.of([Model(name, "m", endpoints=(end,)) for name, end in ends.items()])
        )
        for name in ("a", "b", "a", "b"):
            await chat(running, name)
        assert set(one.shown) == {"new-a", "old-a"}
        assert set(two.shown) == {"new-b", "old-b"}


async def test_without_a_former_key_nothing_is_asked_twice(gateway: Any) -> None:
    script = Guarded("another")
    async with FakeEngine(script) as engine, gateway(engine) as running:
        end = Endpoint("a", "127.0.0.1", engine.port, key="new")
        running.gateway.holder.put(Table.of([Model("m", "m", endpoints=(end,))]))
        assert (await chat(running)).status == 502
        assert script.shown == ["new"]
