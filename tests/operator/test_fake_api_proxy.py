"""The proxy that end-to-end tests put between an operator and its API server.

Proves: it hands on requests, bodies, queries and watches unchanged and counts them; it answers in the
server's place, on a watch as an ERROR event; it tells of an answer before the client has it; a cut ends
connections and leaves the server's data alone; while parted nothing passes, and afterwards what was
not given up; when it ends, it leaves no connection open.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import aiohttp
import pytest
from api_proxy import Answer, ApiProxy, Call
from fake_clock import eventually
from kube_api import KubeApi, resource

DEPLOYMENTS = resource("deployments")
PATH = "/apis/apps/v1/namespaces/ns/deployments"


@pytest.fixture
async def proxy(api: KubeApi) -> AsyncIterator[ApiProxy]:
    with ApiProxy(api.url) as proxy:
        yield proxy


@pytest.fixture
async def http(proxy: ApiProxy) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(proxy.url) as session:
        yield session


def body(name: str) -> dict[str, Any]:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}}


async def test_requests_pass_and_are_counted(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    async with http.post(PATH, json=body("a"), params={"fieldManager": "me & you"}) as response:
        assert response.status == 201
        assert (await response.json())["metadata"]["name"] == "a"
    async with http.get(f"{PATH}/absent") as response:
        assert response.status == 404
    assert [str(call) for call in proxy.requests] == [f"POST {PATH} 201", f"GET {PATH}/absent 404"]
    assert [str(call) for call in proxy.writes()] == [f"POST {PATH} 201"]
    assert api.requests[0].query == {"fieldManager": "me & you"}


async def test_a_watch_passes_as_it_comes_until_it_is_cut(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    async with http.get(PATH, params={"watch": "1"}) as response:
        api.create(DEPLOYMENTS, "ns", body("a"))
        assert json.loads(await response.content.readline())["type"] == "ADDED"
        proxy.cut()
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert len(api.objects(DEPLOYMENTS)) == 1
    async with http.get(PATH) as response:
        assert len((await response.json())["items"]) == 1


async def test_it_answers_in_the_servers_place(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    proxy.script = lambda call: Answer(410, "too old", "Expired") if call.watches else None
    async with http.get(PATH, params={"watch": "true"}) as response:
        event = json.loads(await response.text())
        assert (response.status, event["type"], event["object"]["code"]) == (200, "ERROR", 410)
    proxy.script = lambda call: Answer(503) if call.is_write else None
    async with http.post(PATH, json=body("a")) as response:
        assert (response.status, (await response.json())["message"]) == (503, "scripted")
    assert api.requests == []


async def test_it_tells_of_an_answer_before_the_client_has_it(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    def lose(call: Call) -> None:
        assert (call.status, len(api.objects(DEPLOYMENTS))) == (201, 1)
        proxy.cut()

    proxy.answered = lose
    with pytest.raises(aiohttp.ClientError):
        async with http.post(PATH, json=body("a")) as response:
            await response.read()
    assert len(api.objects(DEPLOYMENTS)) == 1


async def test_nothing_passes_while_parted(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    async with http.get(PATH, params={"watch": "1"}) as response:
        proxy.part()
        asked = asyncio.create_task(http.post(PATH, json=body("a")))
        await eventually(proxy.writes, "the request has come")
        api.create(DEPLOYMENTS, "ns", body("b"))
        heard = asyncio.create_task(response.content.readline())
        await asyncio.sleep(0.2)
        assert not asked.done()
        assert not heard.done()
        assert len(api.objects(DEPLOYMENTS)) == 1
        proxy.join()
        assert json.loads(await heard)["object"]["metadata"]["name"] == "b"
        assert (await asked).status == 201


async def test_a_request_given_up_while_parted_never_arrives(
    api: KubeApi, proxy: ApiProxy, http: aiohttp.ClientSession
) -> None:
    proxy.part()
    with pytest.raises(TimeoutError):
        await http.post(PATH, json=body("a"), timeout=aiohttp.ClientTimeout(total=0.1))
    await eventually(lambda: not proxy.under_way, "the proxy has seen it go")
    proxy.join()
    await asyncio.sleep(0.1)
    assert len(proxy.writes()) == 1
    assert api.objects(DEPLOYMENTS) == []


def test_nothing_is_open_when_it_has_ended() -> None:
    """Though clients came in that moment: what is left open warns later, in whatever test runs then."""
    for _ in range(10):
        with ExitStack() as clients, ApiProxy("http://127.0.0.1:9") as proxy:
            address = ("127.0.0.1", int(proxy.url.rpartition(":")[2]))
            for _ in range(20):
                clients.enter_context(socket.create_connection(address))
    gc.collect()
