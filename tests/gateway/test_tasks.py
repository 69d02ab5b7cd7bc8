"""Work beside the requests that must not end in silence.

Proves: what it raises is said with its name and its trace, and it begins anew; work that returns, and work
that is stopped, ends; and of a gateway: an API that answers no list empties no table and is followed on; so
is a table of which one part of the gateway can make nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_caller import until
from kube_api import VLLM_MODELS, KubeApi
from kube_objects import model
from virtual_loop import VirtualLoop

from vllm_gateway import tasks
from vllm_gateway.discovery.kubernetes import KubernetesSource
from vllm_gateway.discovery.source import TableHolder


def test_work_that_fails_is_said_and_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    loop, begun = VirtualLoop(), []

    async def work() -> None:
        begun.append(loop.time())
        if len(begun) < 4:
            raise ValueError("unforeseen")

    task = loop.create_task(tasks.keep_going("keys", work))
    loop.advance(4.0)
    assert len(begun) == 1
    loop.advance(20.0)
    assert [moment - begun[0] for moment in begun] == [0, 5, 10, 15]
    assert task.done()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.__dict__["fields"]["work"] for record in errors] == ["keys"] * 3
    assert all(record.exc_info for record in errors)
    loop.close()


async def test_work_that_is_stopped_ends() -> None:
    running = [tasks.start(name, lambda: asyncio.sleep(3600)) for name in ("a", "b")]
    await asyncio.sleep(0)
    await tasks.stop(running)
    assert all(task.cancelled() for task in running)


@dataclass(frozen=True)
class Cluster:
    """A fake API, and the table of a source that follows it and begins anew at once."""

    api: KubeApi
    table: TableHolder

    async def shows(self, *names: str) -> None:
        await until(lambda: set(self.table().models) == {f"ns/{name}" for name in names})


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(tasks, "_AGAIN_SECONDS", 0.05)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with KubeApi(bookmark_seconds=0.05) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
        table = TableHolder()
        source = KubernetesSource(table, ())
        await source.start()
        yield Cluster(api, table)
        await source.stop()


async def test_an_answer_that_is_no_list_empties_no_table(cluster: Cluster) -> None:
    api = cluster.api
    api.create(VLLM_MODELS, "ns", model("one"))
    await cluster.shows("one")
    tables: list[set[str]] = []
    cluster.table.tell(lambda models: tables.append(set(models)))
    api.fault("GET", "/vllmmodels", 200, message="a proxy's page", times=2)
    api.end_watches(code=410)
    await until(lambda: any("no list" in note for note in cluster.table().notes))
    await until(lambda: not cluster.table().notes)
    api.create(VLLM_MODELS, "ns", model("two"))
    await cluster.shows("one", "two")
    assert all("ns/one" in models for models in tables)


async def test_a_table_that_a_follower_cannot_take_is_not_the_last_one(cluster: Cluster) -> None:
    failed: list[Any] = []

    def follower(models: Any) -> None:
        if "ns/bad" in models:
            failed.append(models)
            raise KeyError("unforeseen")

    cluster.table.tell(follower)
    cluster.api.create(VLLM_MODELS, "ns", model("bad"))
    await until(lambda: bool(failed))
    cluster.api.delete(VLLM_MODELS, "ns", "bad")
    cluster.api.create(VLLM_MODELS, "ns", model("good"))
    await cluster.shows("good")
