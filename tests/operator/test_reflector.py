"""The reflector against the fake API server: its table is the cluster's, whatever happens to the watch.

Proves: list then watch; a watch that ends or fails goes on; 410 twice in a row; a deletion missed in a gap
is told; nothing is told twice; what our own write answered is no change when its echo comes; an answer that
comes after the deletion is no ghost; a missing right and an absent server are tried again, a refusal that
passes soon; an event that is longer than the client's buffer; the projection (E18, E19).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self

import pytest
from fake_clock import FakeClock, eventually
from kube_api import KubeApi, resource
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from vllm_operator.backoff import Backoff
from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster, Listing, WatchEvent
from vllm_operator.errors import Forbidden
from vllm_operator.kinds import PODS, Body, Kind, ObjectKey
from vllm_operator.reflector import Reflector

FAKE_PODS = resource("pods")


@pytest.fixture
async def cluster(api: KubeApi, tmp_path: Path) -> AsyncIterator[Cluster]:
    configuration = Configuration()
    await kube_config.load_kube_config(
        str(api.write_kubeconfig(tmp_path / "config")), client_configuration=configuration
    )
    async with ApiClient(configuration) as client:
        yield Cluster(client)


class Follower:
    def __init__(self, cluster: Cluster, project: Callable[[Body], Body] = lambda body: body) -> None:
        self.told: list[tuple[str, str]] = []
        self.reflector = Reflector(
            cluster,
            PODS,
            SystemClock(),
            self._note,
            selector="app=x",
            project=project,
            backoff=Backoff(0.01, 0.05),
        )

    def _note(self, old: Body | None, new: Body | None) -> None:
        kind = "added" if old is None else "deleted" if new is None else "changed"
        self.told.append((kind, (new or old or {})["metadata"]["name"]))

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.reflector.run())
        async with asyncio.timeout(30):
            await self.reflector.synced.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def names(self) -> list[str]:
        return sorted(key.name for key in self.reflector.table)

    async def until(self, *names: str) -> None:
        await eventually(lambda: self.names == sorted(names), f"{self.names} become {names}")


def make(api: KubeApi, name: str, app: str = "x") -> Body:
    return api.create(FAKE_PODS, "ns", {"metadata": {"name": name, "labels": {"app": app}}})


async def test_list_then_watch(api: KubeApi, cluster: Cluster) -> None:
    make(api, "a")
    make(api, "other", app="y")
    async with Follower(cluster) as follower:
        assert follower.names == ["a"]
        make(api, "b")
        await follower.until("a", "b")
        api.delete(FAKE_PODS, "ns", "a")
        await follower.until("b")
    assert follower.told == [("added", "a"), ("added", "b"), ("deleted", "a")]


@pytest.mark.parametrize("code", [0, 410, 500])
async def test_a_watch_that_ends_goes_on(api: KubeApi, cluster: Cluster, code: int) -> None:
    make(api, "a")
    async with Follower(cluster) as follower:
        for name in ("b", "c"):
            await asyncio.sleep(0.05)
            api.end_watches(code=code)
            make(api, name)
        await follower.until("a", "b", "c")
    assert sorted(follower.told) == [("added", "a"), ("added", "b"), ("added", "c")]


async def test_a_deletion_missed_in_a_gap_is_told(api: KubeApi, cluster: Cluster) -> None:
    make(api, "a")
    make(api, "b")
    async with Follower(cluster) as follower:
        api.end_watches()
        api.delete(FAKE_PODS, "ns", "a")
        api.compact()
        api.compact()
        await follower.until("b")
    assert follower.told[-1] == ("deleted", "a")


async def test_gone_twice_in_a_row(api: KubeApi, cluster: Cluster) -> None:
    async with Follower(cluster) as follower:
        api.fault("GET", "/pods", 410, times=3)
        api.end_watches(code=410)
        make(api, "a")
        await follower.until("a")


async def test_an_echo_is_no_change_and_an_old_answer_no_ghost(api: KubeApi, cluster: Cluster) -> None:
    async with Follower(cluster) as follower:
        body = make(api, "a")
        follower.reflector.note(body)
        await asyncio.sleep(0.15)
        assert follower.told == [("added", "a")]
        api.delete(FAKE_PODS, "ns", "a")
        await follower.until()
        follower.reflector.note(body)
        assert follower.names == []
        make(api, "a")
        await follower.until("a")


@pytest.mark.parametrize("code", [403, 429, 503])
async def test_a_refused_list_is_tried_again(api: KubeApi, cluster: Cluster, code: int) -> None:
    make(api, "a")
    api.fault("GET", "/pods", code, times=3)
    async with Follower(cluster) as follower:
        assert follower.names == ["a"]


class StartingServer:
    """An API server that has just come back: it refuses until it has read the roles."""

    def __init__(self) -> None:
        self.refusals = 3

    async def list(
        self,
        kind: Kind,
        namespace: str = "",
        selector: str = "",
        fields: str = "",
        *,
        keep: Callable[[Body], Body],
    ) -> Listing:
        self.refusals -= 1
        if self.refusals >= 0:
            raise Forbidden(403, "Forbidden", "cannot list resource")
        return Listing([], "1")

    async def watch(
        self, kind: Kind, namespace: str, selector: str, since: str, fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        await asyncio.Event().wait()
        yield WatchEvent("BOOKMARK", {})


@pytest.mark.parametrize("optional", [False, True])
async def test_a_refusal_that_passes_costs_seconds(clock: FakeClock, optional: bool) -> None:
    """E19: also where a missing right is no trouble and is asked for every ten minutes in the end."""
    server = StartingServer()
    reflector = Reflector(server, PODS, clock, lambda _old, _new: None, optional=optional)
    task = asyncio.create_task(reflector.run())
    await clock.advance(5)
    assert reflector.synced.is_set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_right_that_stays_missing_is_asked_for_seldom(clock: FakeClock) -> None:
    server = StartingServer()
    server.refusals = 1000
    reflector = Reflector(server, PODS, clock, lambda _old, _new: None, optional=True)
    task = asyncio.create_task(reflector.run())
    await clock.advance(3600)
    assert 1000 - server.refusals < 25
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_absent_server_keeps_the_table_and_heals(api: KubeApi, cluster: Cluster) -> None:
    make(api, "a")
    make(api, "b")
    async with Follower(cluster) as follower:
        await api.stop_listening()
        await asyncio.sleep(0.2)
        assert follower.names == ["a", "b"]
        api.delete(FAKE_PODS, "ns", "b")
        await api.start_listening()
        await follower.until("a")


async def test_only_the_projection_is_kept(api: KubeApi, cluster: Cluster) -> None:
    make(api, "a")
    keep = ("name", "namespace", "uid", "resourceVersion")
    async with Follower(
        cluster, lambda body: {"metadata": {key: body["metadata"][key] for key in keep}}
    ) as follower:
        assert set(follower.reflector.table[ObjectKey("ns", "a")]["metadata"]) == set(keep)


async def test_an_event_that_is_longer_than_the_clients_buffer_is_found_by_a_list(api: KubeApi) -> None:
    """aiohttp's error for it is none of its client's, and anybody may make a large pod."""
    configuration = Configuration()
    configuration.host = api.url
    configuration.client_session_kwargs = {"read_bufsize": 1024}  # ours is 2 MiB
    async with ApiClient(configuration) as client, Follower(Cluster(client)) as follower:
        labels, annotations = {"app": "x"}, {"long": "x" * 10_000}
        api.create(FAKE_PODS, "ns", {"metadata": {"name": "a", "labels": labels, "annotations": annotations}})
        await follower.until("a")
        make(api, "b")
        await follower.until("a", "b")
