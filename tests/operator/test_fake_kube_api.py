"""The fake API server keeps the parts of the protocol that our clients lean on.

Proves: discovery; create, conflict and the server's own fields; a status only by its subresource; generation;
preconditions; server-side apply creates, merges keyed lists, removes what its manager dropped and leaves the
rest; a no-op writes nothing; selectors; metadata alone; paging; watch from a version, selector transitions,
bookmarks, 410; deletion with garbage collection; dry run; scripted faults; refused connections and the same
port afterwards.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from kube_api import VLLM_MODELS, Json, KubeApi, resource
from kube_store import Refused

PODS, DEPLOYMENTS = resource("pods"), resource("deployments")
APPLY = {"Content-Type": "application/apply-patch+yaml"}


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with KubeApi(bookmark_seconds=0.05) as api:
        yield api


@pytest.fixture
async def http(api: KubeApi) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(api.url) as session:
        yield session


async def call(
    http: aiohttp.ClientSession, method: str, path: str, body: Any = None, **kw: Any
) -> tuple[int, Json]:
    async with http.request(method, path, data=None if body is None else json.dumps(body), **kw) as response:
        return response.status, await response.json()


def named(name: str, **rest: Any) -> Json:
    return {"metadata": {"name": name}, **rest}


async def watch(http: aiohttp.ClientSession, path: str, count: int, **query: str) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    async with http.get(path, params={"watch": "1", **query}) as response:
        async for line in response.content:
            event = json.loads(line)
            seen.append((event["type"], event["object"].get("metadata", {}).get("name", "")))
            if len(seen) == count:
                break
    return seen


async def test_discovery_names_the_kinds(http: aiohttp.ClientSession) -> None:
    _, groups = await call(http, "GET", "/apis")
    _, kinds = await call(http, "GET", "/apis/vllm-fleet.dev/v1alpha1")
    assert "vllm-fleet.dev" in [group["name"] for group in groups["groups"]]
    assert [item["name"] for item in kinds["resources"]] == ["vllmmodels"]
    assert (await call(http, "GET", "/apis/no.such/v1/things"))[0] == 404


async def test_create_fills_the_servers_fields_and_conflicts_on_the_second(
    http: aiohttp.ClientSession,
) -> None:
    path = "/apis/vllm-fleet.dev/v1alpha1/namespaces/ns/vllmmodels"
    code, made = await call(http, "POST", path, named("m", spec={"model": "x"}, status={"forged": True}))
    assert code == 201
    assert made["kind"] == "VLLMModel"
    assert made["metadata"]["namespace"] == "ns"
    assert made["metadata"]["generation"] == 1
    assert made["metadata"]["uid"]
    assert "status" not in made
    code, refused = await call(http, "POST", path, named("m"))
    assert (code, refused["reason"]) == (409, "AlreadyExists")


async def test_spec_and_status_are_written_apart(api: KubeApi, http: aiohttp.ClientSession) -> None:
    api.create(VLLM_MODELS, "ns", named("m", spec={"model": "x"}))
    path = "/apis/vllm-fleet.dev/v1alpha1/namespaces/ns/vllmmodels/m"
    merge = {"Content-Type": "application/merge-patch+json"}
    _, after = await call(
        http, "PATCH", f"{path}/status", {"status": {"a": 1}, "spec": {"model": "y"}}, headers=merge
    )
    assert (after["spec"]["model"], after["status"], after["metadata"]["generation"]) == ("x", {"a": 1}, 1)
    _, after = await call(http, "PATCH", path, {"status": {"a": 2}, "spec": {"model": "y"}}, headers=merge)
    assert (after["spec"]["model"], after["status"], after["metadata"]["generation"]) == ("y", {"a": 1}, 2)


async def test_put_with_an_old_version_is_a_conflict(api: KubeApi, http: aiohttp.ClientSession) -> None:
    made = api.create(DEPLOYMENTS, "ns", named("d", spec={"replicas": 1}))
    api.patch(DEPLOYMENTS, "ns", "d", {"spec": {"replicas": 2}})
    made["spec"]["replicas"] = 3
    code, refused = await call(http, "PUT", "/apis/apps/v1/namespaces/ns/deployments/d", made)
    assert (code, refused["reason"]) == (409, "Conflict")


async def test_apply_creates_merges_and_removes_only_its_own(
    api: KubeApi, http: aiohttp.ClientSession
) -> None:
    path = "/apis/apps/v1/namespaces/ns/deployments/d?fieldManager=me&force=true"

    def spec(*env: str) -> Json:
        variables = [{"name": name, "value": "1"} for name in env]
        return named("d", spec={"template": {"spec": {"containers": [{"name": "engine", "env": variables}]}}})

    code, made = await call(http, "PATCH", path, spec("A", "B"), headers=APPLY)
    assert code == 201
    sidecar = {"name": "sidecar", "image": "i"}
    containers = [*made["spec"]["template"]["spec"]["containers"], sidecar]
    other = {"spec": {"replicas": 5, "template": {"spec": {"containers": containers}}}}
    api.patch(DEPLOYMENTS, "ns", "d", other)
    code, made = await call(http, "PATCH", path, spec("B", "C"), headers=APPLY)
    assert code == 200
    engine, kept = made["spec"]["template"]["spec"]["containers"]
    assert [item["name"] for item in engine["env"]] == ["B", "C"]
    assert kept == sidecar
    assert made["spec"]["replicas"] == 5


async def test_apply_that_changes_nothing_writes_nothing(api: KubeApi, http: aiohttp.ClientSession) -> None:
    path = "/api/v1/namespaces/ns/services/s?fieldManager=me&force=true"
    _, first = await call(http, "PATCH", path, named("s", spec={"type": "ClusterIP"}), headers=APPLY)
    version = api.store.version
    _, second = await call(http, "PATCH", path, named("s", spec={"type": "ClusterIP"}), headers=APPLY)
    assert first == second
    assert api.store.version == version


async def test_apply_with_the_uid_of_a_lost_object_conflicts(http: aiohttp.ClientSession) -> None:
    body = {"metadata": {"name": "s", "uid": "gone"}}
    path = "/api/v1/namespaces/ns/services/s?fieldManager=me&force=true"
    assert (await call(http, "PATCH", path, body, headers=APPLY))[0] == 409


async def test_dry_run_stores_nothing(api: KubeApi, http: aiohttp.ClientSession) -> None:
    assert (await call(http, "POST", "/api/v1/namespaces/ns/services?dryRun=All", named("s")))[0] == 201
    assert api.objects(resource("services")) == []


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("", ["a", "b", "c"]),
        ("app=x", ["a"]),
        ("app!=x", ["b", "c"]),
        ("app in (x,y)", ["a", "b"]),
        ("app", ["a", "b"]),
        ("!app", ["c"]),
        ("app in (x,y),app!=y", ["a"]),
    ],
)
async def test_label_selectors(
    api: KubeApi, http: aiohttp.ClientSession, selector: str, names: list[str]
) -> None:
    for name, labels in (("a", {"app": "x"}), ("b", {"app": "y"}), ("c", {})):
        api.create(PODS, "ns", {"metadata": {"name": name, "labels": labels}})
    _, found = await call(http, "GET", "/api/v1/pods", params={"labelSelector": selector})
    assert [item["metadata"]["name"] for item in found["items"]] == names


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("metadata.name=a", ["a"]),
        ("type=Warning", ["a", "b"]),
        ("type=Warning,reason!=Unhealthy", ["a"]),
        ("involvedObject.kind=Pod", ["b"]),
    ],
)
async def test_field_selectors(
    api: KubeApi, http: aiohttp.ClientSession, selector: str, names: list[str]
) -> None:
    api.create(resource("events"), "ns", named("a", type="Warning", reason="FailedMount"))
    about = {"kind": "Pod"}
    api.create(resource("events"), "ns", named("b", type="Warning", reason="Unhealthy", involvedObject=about))
    api.create(resource("events"), "ns", named("c", type="Normal"))
    _, found = await call(http, "GET", "/api/v1/events", params={"fieldSelector": selector})
    assert [item["metadata"]["name"] for item in found["items"]] == names


async def test_partial_metadata_leaves_the_content_out(api: KubeApi, http: aiohttp.ClientSession) -> None:
    since = str(api.store.version)
    accept = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}
    _, none = await call(http, "GET", "/api/v1/secrets", headers=accept)
    assert none["items"] is None  # as Kubernetes 1.37 has it; otherwise an empty list
    api.create(resource("secrets"), "ns", named("a", data={"token": "c2VjcmV0"}))
    _, found = await call(http, "GET", "/api/v1/secrets", headers=accept)
    assert [item.keys() for item in found["items"]] == [{"apiVersion", "kind", "metadata"}]
    accept = {"Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"}
    query = {"watch": "1", "resourceVersion": since}
    async with http.get("/api/v1/secrets", params=query, headers=accept) as response:
        event = json.loads(await response.content.readline())
    assert event["object"].keys() == {"apiVersion", "kind", "metadata"}


async def test_lists_come_in_pages_of_the_asked_size(api: KubeApi, http: aiohttp.ClientSession) -> None:
    for name in "abc":
        api.create(PODS, "ns", named(name))
    _, first = await call(http, "GET", "/api/v1/pods", params={"limit": "2"})
    _, rest = await call(
        http, "GET", "/api/v1/pods", params={"limit": "2", "continue": first["metadata"]["continue"]}
    )
    assert [len(first["items"]), len(rest["items"])] == [2, 1]
    assert "continue" not in rest["metadata"]


async def test_watch_replays_from_a_version_and_goes_on(api: KubeApi, http: aiohttp.ClientSession) -> None:
    since = str(api.store.version)
    api.create(PODS, "ns", named("a"))
    api.patch(PODS, "ns", "a", {"spec": {"nodeName": "n"}})
    api.delete(PODS, "ns", "a")
    seen = await watch(http, "/api/v1/namespaces/ns/pods", 3, resourceVersion=since)
    assert seen == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]


async def test_an_object_that_leaves_the_selection_is_deleted_for_the_watcher(
    api: KubeApi, http: aiohttp.ClientSession
) -> None:
    since = str(api.store.version)
    api.create(PODS, "ns", {"metadata": {"name": "a", "labels": {"app": "x"}}})
    api.patch(PODS, "ns", "a", {"metadata": {"labels": {"app": "y"}}})
    seen = await watch(http, "/api/v1/pods", 2, resourceVersion=since, labelSelector="app=x")
    assert seen == [("ADDED", "a"), ("DELETED", "a")]


async def test_no_bookmark_comes_of_events(http: aiohttp.ClientSession) -> None:
    """As of a real server, which has no watch cache of them."""
    query = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": "1"}
    async with http.get("/api/v1/events", params=query) as response:
        assert await response.read() == b""


async def test_bookmarks_come_in_silence_and_the_timeout_ends_the_watch(http: aiohttp.ClientSession) -> None:
    seen = await watch(http, "/api/v1/pods", 99, allowWatchBookmarks="true", timeoutSeconds="0.2")
    assert set(seen) == {("BOOKMARK", "")}


async def test_a_version_before_the_compaction_is_gone(api: KubeApi, http: aiohttp.ClientSession) -> None:
    since = str(api.store.version)
    api.create(PODS, "ns", named("a"))
    api.compact()
    async with http.get("/api/v1/pods", params={"watch": "1", "resourceVersion": since}) as response:
        event = json.loads(await response.content.readline())
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


async def test_watches_end_when_told(api: KubeApi, http: aiohttp.ClientSession) -> None:
    async with http.get("/api/v1/pods", params={"watch": "1", "resourceVersion": "1000"}) as response:
        api.end_watches(code=500)
        event = json.loads(await response.content.readline())
        assert event["object"]["code"] == 500
        assert await response.content.read() == b""


async def test_dependents_go_with_their_owner(api: KubeApi, http: aiohttp.ClientSession) -> None:
    owner = api.create(VLLM_MODELS, "ns", named("m"))["metadata"]["uid"]
    reference = {"apiVersion": "v", "kind": "VLLMModel", "name": "m", "uid": owner}
    api.create(DEPLOYMENTS, "ns", {"metadata": {"name": "d", "ownerReferences": [reference]}})
    assert (await call(http, "DELETE", "/apis/vllm-fleet.dev/v1alpha1/namespaces/ns/vllmmodels/m"))[0] == 200
    assert api.objects(DEPLOYMENTS) == []
    api.create(DEPLOYMENTS, "ns", {"metadata": {"name": "late", "ownerReferences": [reference]}})
    assert api.objects(DEPLOYMENTS) == []


async def test_faults_answer_as_often_as_scripted(api: KubeApi, http: aiohttp.ClientSession) -> None:
    api.fault("GET", "/pods", 429, retry_after=3)
    api.fault("POST", "/deployments", 403, message="exceeded quota")
    async with http.get("/api/v1/pods") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
    assert (await call(http, "GET", "/api/v1/pods"))[0] == 200
    code, refused = await call(http, "POST", "/apis/apps/v1/namespaces/ns/deployments", named("d"))
    assert (code, refused["message"], refused["reason"]) == (403, "exceeded quota", "Forbidden")
    assert [request.method for request in api.writes()] == ["POST"]


async def test_it_can_be_down_and_come_back_on_the_same_port(
    api: KubeApi, http: aiohttp.ClientSession
) -> None:
    url = api.url
    await api.stop_listening()
    with pytest.raises(aiohttp.ClientConnectionError):
        await call(http, "GET", "/api/v1/pods")
    await api.start_listening()
    assert api.url == url
    assert (await call(http, "GET", "/api/v1/pods"))[0] == 200


async def test_the_kubeconfig_points_here(api: KubeApi, tmp_path: Path) -> None:
    config = yaml.safe_load(api.write_kubeconfig(tmp_path / "config").read_text())
    assert config["clusters"][0]["cluster"]["server"] == api.url


async def test_acting_in_process_is_refused_like_over_http(api: KubeApi) -> None:
    with pytest.raises(Refused, match="not found"):
        api.get(PODS, "ns", "nobody")
