"""Models from a Kubernetes API, through the official client, against a fake API server over a real socket.

Proves: a model with ready pods is routed by its full name and its granted names; only slices of the
endpointslice controller for the Service of that very model count; pods that terminate leave; what the
Ready condition says is what callers read; a missed deletion heals at the next list; 410, an error event, a
cut watch and an API that is down change nothing that is served, and its return is noticed within seconds
(FACTS E18, E19); neither an event that is too long, nor one that nobody expects, nor what fails at a change
ends the discovery; no configuration is one clear line.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine import FakeEngine
from http_caller import ask, get, until
from kube_api import VLLM_MODELS, KubeApi, resource
from kube_objects import endpoint, model, slice_of
from virtual_loop import VirtualLoop

from vllm_gateway.discovery.kubernetes import KubernetesSource
from vllm_gateway.discovery.reflector import ApiError, Json, Reflector
from vllm_gateway.discovery.source import TableHolder
from vllm_gateway.settings import BadSettings

SLICES = resource("endpointslices")


def add_slice(
    api: KubeApi, body: dict[str, Any], *endpoints: dict[str, Any], port: int = 8000
) -> dict[str, Any]:
    """As the controllers make it: a Service, and a slice that it owns."""
    name = f"{body['metadata']['name']}-engine"
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {}}
    owner = api.create(resource("services"), "ns", service)
    made = slice_of(body, *endpoints, service_uid=owner["metadata"]["uid"])
    made["ports"][0]["port"] = port
    return api.create(SLICES, "ns", made)


class Cluster:
    """A fake API and a source that watches it."""

    def __init__(self, api: KubeApi, holder: TableHolder, source: KubernetesSource) -> None:
        self.api = api
        self.table = holder
        self.source = source

    def add_model(self, name: str = "m", namespace: str = "ns", **options: Any) -> dict[str, Any]:
        body = model(name, **options)
        created = self.api.create(VLLM_MODELS, namespace, body)
        self.api.patch_status(VLLM_MODELS, namespace, name, body["status"])
        return created

    def add_slice(self, body: dict[str, Any], *endpoints: dict[str, Any], port: int = 8000) -> dict[str, Any]:
        return add_slice(self.api, body, *endpoints, port=port)

    def addresses(self, name: str) -> set[str]:
        models = self.table().names.get(name, ())
        return {end.host for found in models for end in found.endpoints}


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    async with watching(tmp_path, monkeypatch) as found:
        yield found


@contextlib.asynccontextmanager
async def watching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *namespaces: str
) -> AsyncIterator[Cluster]:
    async with KubeApi(bookmark_seconds=0.05) as api:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
        holder = TableHolder()
        source = KubernetesSource(holder, namespaces)
        await source.start()
        try:
            yield Cluster(api, holder, source)
        finally:
            await source.stop()


async def test_a_ready_model_is_routed_by_its_full_name_and_its_granted_names(cluster: Cluster) -> None:
    body = cluster.add_model(served=["short", "other"], gateway={"firstTokenTimeout": "1m30s", "weight": 20})
    cluster.add_slice(body, endpoint(), endpoint("pod-2", "10.0.0.2"))
    await until(lambda: cluster.addresses("ns/m") == {"10.0.0.1", "10.0.0.2"})
    table = cluster.table()
    assert table.complete
    assert set(table.names) == {"ns/m", "short", "other"}
    found = table.models["ns/m"]
    assert (found.upstream_name, found.weight, found.limits.first_token) == ("m", 20, 90.0)
    assert {end.id for end in found.endpoints} == {"pod-1", "pod-2"}


async def test_a_model_that_is_not_ready_says_why(cluster: Cluster) -> None:
    cluster.add_model(ready="False")
    await until(lambda: "ns/m" in cluster.table().models)
    found = cluster.table().models["ns/m"]
    assert (found.reason, found.message, found.endpoints) == ("Loading", "weights: 40 %", ())


async def test_a_pod_that_terminates_leaves_and_one_that_becomes_ready_joins(cluster: Cluster) -> None:
    body = cluster.add_model()
    made = cluster.add_slice(body, endpoint(), endpoint("pod-2", "10.0.0.2", ready=False))
    await until(lambda: cluster.addresses("m") == {"10.0.0.1"})
    changed = [endpoint(terminating=True), endpoint("pod-2", "10.0.0.2")]
    cluster.api.patch(SLICES, "ns", made["metadata"]["name"], {"endpoints": changed})
    await until(lambda: cluster.addresses("m") == {"10.0.0.2"})


async def test_a_deleted_model_is_gone(cluster: Cluster) -> None:
    cluster.add_model()
    await until(lambda: "m" in cluster.table().names)
    cluster.api.delete(VLLM_MODELS, "ns", "m")
    await until(lambda: not cluster.table().models)
    assert cluster.table().complete


async def test_e18_a_deletion_that_the_watch_missed_heals_at_the_next_list(cluster: Cluster) -> None:
    body = cluster.add_model()
    cluster.add_slice(body, endpoint())
    await until(lambda: cluster.addresses("m") == {"10.0.0.1"})
    await cluster.api.stop_listening()
    cluster.api.delete(SLICES, "ns", "m-engine-x")
    cluster.api.compact()  # the old version is too old: 410
    await cluster.api.start_listening()
    await until(lambda: cluster.addresses("m") == set())


@pytest.mark.parametrize("code", [0, 410, 500])
async def test_e18_a_watch_that_ends_goes_on(cluster: Cluster, code: int) -> None:
    cluster.add_model("one")
    await until(lambda: "one" in cluster.table().names)
    for _ in range(3):  # the official client's Watch gives up at the second 410
        cluster.api.end_watches(code=code)
        await asyncio.sleep(0.05)
    cluster.add_model("two")
    await until(lambda: {"one", "two"} <= set(cluster.table().names))


async def test_e19_an_api_that_is_down_changes_nothing_that_is_served(cluster: Cluster) -> None:
    body = cluster.add_model()
    cluster.add_slice(body, endpoint())
    await until(lambda: cluster.addresses("m") == {"10.0.0.1"})
    await cluster.api.stop_listening()
    await until(lambda: bool(cluster.table().notes))
    assert cluster.addresses("m") == {"10.0.0.1"}
    assert cluster.table().complete
    assert "the Kubernetes API" in cluster.table().notes[0]
    assert cluster.source.age() > 0
    await cluster.api.start_listening()
    await until(lambda: not cluster.table().notes)
    cluster.add_model("two")
    await until(lambda: "two" in cluster.table().names)


async def test_an_object_that_is_too_long_for_a_watch_is_found_by_a_list(cluster: Cluster) -> None:
    """aiohttp refuses lines of more than 4 MiB, with an error that is none of its client's."""
    await until(lambda: cluster.table().complete and cluster.api.watches == 2)
    cluster.add_model("large", note="x" * 5 * 2**20)
    await until(lambda: "large" in cluster.table().names)
    cluster.add_model("small")
    await until(lambda: "small" in cluster.table().names)


async def test_what_fails_at_one_change_is_tried_at_the_next(cluster: Cluster) -> None:
    def follow(models: Mapping[str, Any]) -> None:
        if set(models) == {"ns/one"}:
            raise ValueError("a fault of ours")

    cluster.table.tell(follow)
    cluster.add_model("one")
    await until(lambda: "one" in cluster.table().names)
    cluster.add_model("two")
    await until(lambda: "two" in cluster.table().names)


class AwayApi:
    """Refuses connections until it is back."""

    def __init__(self) -> None:
        self.is_back, self.asked = False, 0

    async def get(self, path: str, query: Mapping[str, str]) -> Json:
        self.asked += 1
        if not self.is_back:
            raise ApiError(0, "connection refused")
        return {"items": [], "metadata": {"resourceVersion": "1"}}

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        await asyncio.Event().wait()
        yield {}


def test_e19_the_return_of_an_api_that_was_long_away_is_noticed_within_seconds() -> None:
    loop, api = VirtualLoop(), AwayApi()
    reflector = Reflector(api, "/models", lambda: None)
    task = loop.create_task(reflector.run())
    loop.advance(120)
    assert reflector.problem == "connection refused"
    assert 20 < api.asked < 60, "neither given up nor hammered"
    api.is_back = True
    loop.advance(5)
    assert reflector.synced
    task.cancel()
    loop.settle()
    loop.close()


class OddApi(AwayApi):
    """Answers with what no API server says, once."""

    async def get(self, path: str, query: Mapping[str, str]) -> Json:
        self.asked += 1
        return {"items": ["no object"] if self.asked == 1 else [], "metadata": {}}


def test_an_answer_that_nobody_expects_is_told_and_asked_for_again() -> None:
    loop, api = VirtualLoop(), OddApi()
    reflector = Reflector(api, "/models", lambda: None)
    task = loop.create_task(reflector.run())
    loop.advance(0.01)
    assert (reflector.synced, reflector.problem) == (
        False,
        "AttributeError: 'str' object has no attribute 'get'",
    )
    loop.advance(1)
    assert (reflector.synced, reflector.problem) == (True, "")
    task.cancel()
    loop.settle()
    loop.close()


@pytest.mark.parametrize(("code", "words"), [(403, "refuses vllmmodels"), (404, "CRD"), (500, "refuses")])
async def test_a_refusal_is_said_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    async with KubeApi() as api:
        api.fault("GET", "/vllmmodels", code, message="no")
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
        holder = TableHolder()
        source = KubernetesSource(holder, ())
        await source.start()
        try:
            await until(lambda: any(words in note for note in holder().notes))
            assert not holder().complete
            await until(lambda: holder().complete and not holder().notes)
        finally:
            await source.stop()


async def test_named_namespaces_alone_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(tmp_path, monkeypatch, "a", "b") as cluster:
        for namespace in ("a", "b", "c"):
            cluster.add_model("m", namespace, served=[])
        await until(lambda: set(cluster.table().models) == {"a/m", "b/m"})
        assert not any(request.path.count("namespaces") == 0 for request in cluster.api.requests)


async def test_long_lists_come_in_pages(cluster: Cluster) -> None:
    for number in range(3):
        cluster.add_model(f"m{number}")
    await until(lambda: len(cluster.table().models) == 3)
    lists = [request for request in cluster.api.requests if not request.query.get("watch")]
    assert all(request.query["limit"] == "500" for request in lists)


async def test_requests_go_to_the_pods_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: Any
) -> None:
    async with KubeApi() as api, FakeEngine() as one:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
        async with gateway(options={"queue": {"queueTimeout": "0s"}}) as running:
            await until(lambda: running.gateway.holder().complete)
            body = api.create(VLLM_MODELS, "ns", model(ready="False"))
            api.patch_status(VLLM_MODELS, "ns", "m", model(ready="False")["status"])

            async def seen() -> bool:
                return bool((await get(running.port, "/models")).json()["models"])

            await until(seen)
            chat = {"model": "m", "messages": [], "stream": True}
            answer = await ask(running.port, "/v1/chat/completions", chat)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["message"] == "The model 'm' is not ready: Loading: weights: 40 %"
            assert (await get(running.port, "/v1/models")).json()["data"][0]["id"] == "m"

            add_slice(api, body, endpoint(address="127.0.0.1"), port=one.port)
            chat["model"] = "ns/m"

            async def seen() -> bool:
                return bool((await ask(running.port, "/v1/chat/completions", chat)).status == 200)

            await until(seen)
            assert one.seen[-1].json()["model"] == "m"  # the engine's name for it, in place


def test_no_configuration_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(BadSettings, match="set VLLM_URL"):
        KubernetesSource(TableHolder(), ())
