"""The client at the API server's door: what goes over the wire, and what its refusals become.

Proves: create, apply with uid and field manager, delete with a precondition; lists of no and many pages; each
refusal is the right error with the server's own words; Retry-After; no answer, a slow answer and an answer
that is no JSON are Unavailable; every failure is counted by its code, and the absence of an optional API is
none; a refusal never quotes more than is readable; HTTP_PROXY and NO_PROXY are followed, and ~/.netrc is not
asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from kube_api import KubeApi, resource
from kubernetes.aio.client import ApiClient, Configuration

from vllm_operator import cluster as cluster_module
from vllm_operator.cluster import Cluster, connect
from vllm_operator.errors import ApiError, Conflict, Forbidden, Gone, Invalid, NotFound, Unavailable
from vllm_operator.kinds import EVENTS, GROUPS, PODS, SECRETS, SERVICES, Kind, ObjectKey, uid_of

KEY = ObjectKey("ns", "s")
BODY = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "s", "namespace": "ns"},
    "spec": {"type": "ClusterIP"},
}


class Counted:
    def __init__(self, url: str) -> None:
        configuration = Configuration()
        configuration.host = url
        self.codes: list[int] = []
        self.client = ApiClient(configuration)
        self.cluster = Cluster(self.client, self.codes.append)


@pytest.fixture
async def counted(api: KubeApi) -> AsyncIterator[Counted]:
    made = Counted(api.url)
    yield made
    await made.client.close()


async def test_create_get_apply_delete(api: KubeApi, counted: Counted) -> None:
    cluster = counted.cluster
    made = await cluster.create(SERVICES, BODY)
    assert uid_of(await cluster.get(SERVICES, KEY)) == uid_of(made)
    applied = await cluster.apply(SERVICES, BODY | {"spec": {"type": "NodePort"}}, uid=uid_of(made))
    assert applied["spec"]["type"] == "NodePort"
    patch = api.requests[-1]
    assert (patch.method, patch.content_type) == ("PATCH", "application/apply-patch+yaml")
    assert dict(patch.query) == {"fieldManager": "vllm-operator", "force": "true"}
    with pytest.raises(Conflict):
        await cluster.delete(SERVICES, KEY, uid="another")
    await cluster.delete(SERVICES, KEY, uid=uid_of(made))
    await cluster.delete(SERVICES, KEY, uid=uid_of(made))
    assert counted.codes == [409, 404]


async def test_an_apply_never_creates_anew_what_is_gone(api: KubeApi, counted: Counted) -> None:
    with pytest.raises(Conflict):
        await counted.cluster.apply(SERVICES, BODY, uid="gone")
    assert api.objects(resource("services")) == []


async def test_a_list_may_be_empty(api: KubeApi, counted: Counted) -> None:
    """Also one of metadata alone, whose items the server then gives as null."""
    for kind in (PODS, SECRETS):
        assert (await counted.cluster.list(kind, "ns")).items == []


async def test_a_list_has_all_pages(api: KubeApi, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "PAGE_SIZE", 2)
    for name in "abcde":
        api.create(resource("pods"), "ns", {"metadata": {"name": name}})
    listing = await counted.cluster.list(PODS)
    assert [body["metadata"]["name"] for body in listing.items] == list("abcde")
    assert {body["kind"] for body in listing.items} == {"Pod"}
    assert len(api.requests) == 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, Invalid),
        (401, Unavailable),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Gone),
        (418, ApiError),
        (422, Invalid),
        (429, Unavailable),
        (500, Unavailable),
        (503, Unavailable),
    ],
)
async def test_each_refusal_is_the_right_error(
    api: KubeApi, counted: Counted, code: int, kind: type[ApiError]
) -> None:
    api.fault("GET", "/services", code, message="the server's words", retry_after=7)
    with pytest.raises(kind, match="the server's words") as caught:
        await counted.cluster.get(SERVICES, KEY)
    assert (caught.value.code, caught.value.retry_after) == (code, 7)
    assert counted.codes == [code]


@pytest.mark.parametrize(
    ("kind", "path", "status", "told"),
    [
        (GROUPS, "/leaderworkersets", 404, []),
        (GROUPS, "/leaderworkersets", 500, [500]),
        (PODS, "/pods", 404, [404]),
    ],
)
async def test_an_optional_api_that_is_absent_is_no_failure(
    api: KubeApi, counted: Counted, kind: Kind, path: str, status: int, told: list[int]
) -> None:
    api.fault("GET", path, status)
    with pytest.raises(ApiError):
        await counted.cluster.list(kind)
    assert counted.codes == told


async def test_a_write_to_an_absent_api_is_a_failure(api: KubeApi, counted: Counted) -> None:
    api.fault("POST", "/leaderworkersets", 404)
    with pytest.raises(NotFound):
        await counted.cluster.create(GROUPS, {"metadata": {"name": "m", "namespace": "ns"}})
    assert counted.codes == [404]


async def test_no_connection_is_unavailable(api: KubeApi, counted: Counted) -> None:
    await api.stop_listening()
    with pytest.raises(Unavailable, match="cannot be reached"):
        await counted.cluster.get(SERVICES, KEY)
    assert counted.codes == [0]


async def test_a_slow_answer_is_unavailable(
    api: KubeApi, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "REQUEST_TIMEOUT", aiohttp.ClientTimeout(total=0.1))
    api.fault("GET", "/services", 500, hang=5)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await counted.cluster.get(SERVICES, KEY)


async def test_a_silent_watch_ends(api: KubeApi, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "WATCH_TIMEOUT", aiohttp.ClientTimeout(total=None, sock_read=0.1))
    api.bookmark_seconds = 60
    with pytest.raises(Unavailable):
        async for _ in counted.cluster.watch(PODS, "", "", "1000"):
            pass


async def test_a_watch_of_events_may_be_silent_and_is_ended_by_the_server(
    api: KubeApi, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server sends no bookmarks of them: else each silence of 90 s would be a failure, and a whole list."""
    monkeypatch.setattr(cluster_module, "WATCH_TIMEOUT", aiohttp.ClientTimeout(total=None, sock_read=0.05))
    monkeypatch.setattr(cluster_module, "UNMARKED_SECONDS", 1)
    assert [event async for event in counted.cluster.watch(EVENTS, "", "", "1000")] == []
    assert counted.codes == []


@pytest.mark.parametrize(
    ("status", "body"), [(502, "<html>Bad gateway" + "x" * 9000), (200, "no json"), (403, "[1]")]
)
async def test_what_a_proxy_in_between_answers(status: int, body: str) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made = Counted(f"http://127.0.0.1:{runner.addresses[0][1]}")
    with pytest.raises(ApiError) as caught:
        await made.cluster.get(SERVICES, KEY)
    assert len(caught.value.message) <= 300
    await made.client.close()
    await runner.cleanup()


async def test_outside_of_a_cluster_kubeconfig_says_where(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
    async with await connect() as client:
        listing = await Cluster(client).list(PODS)
    assert listing.items == []


async def test_a_proxy_of_the_environment_is_taken_and_passed_by(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
    asked: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(str(request.raw_path))
        return web.json_response({"items": [], "metadata": {"resourceVersion": "1"}})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{runner.addresses[0][1]}")
    for bypassed in ("", "127.0.0.1"):
        monkeypatch.setenv("no_proxy", bypassed)
        async with await connect() as client:
            await Cluster(client).list(PODS)
    await runner.cleanup()
    assert asked == [f"{api.url}/api/v1/pods?limit=100"]
    assert [request.path for request in api.requests] == ["/api/v1/pods"]


async def test_netrc_is_not_asked_for_credentials(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
    async with await connect() as client:
        assert (await Cluster(client).list(PODS)).items == []


async def test_a_cancelled_request_leaves_no_task(api: KubeApi, counted: Counted) -> None:
    api.fault("GET", "/services", 500, hang=5)
    task = asyncio.create_task(counted.cluster.get(SERVICES, KEY))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
