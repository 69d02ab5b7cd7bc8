"""The whole operator against the fake API server, kopf and all: from an event to its effect.

Proves: a model is served and deleted; a child deleted by hand is back; an edit rolls out; a watch that ends
with an error, an API server that is away, a deletion that was missed and a CRD that comes late are survived;
a restart over unchanged models writes its lease and nothing else; two operators have one writer, and the
second takes over; the probes and the metrics; kopf writes nothing into models; one namespace can be all that
it sees; SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_clock import eventually
from kube_api import VLLM_MODELS, KubeApi, resource
from kubernetes.aio.client import ApiClient, Configuration
from vllm_models import model_body

from vllm_operator.app import Operator
from vllm_operator.clock import SystemClock
from vllm_operator.errors import SettingsError
from vllm_operator.settings import Settings, parse_settings

DEPLOYMENTS, SERVICES, LEASES = resource("deployments"), resource("services"), resource("leases")
FAST: dict[str, Any] = {
    "managementPort": 0,
    "managementHost": "127.0.0.1",
    "lease": {"durationSeconds": 3, "renewSeconds": 2, "retrySeconds": 0.1},
    "gpu": {"watchNodes": False},
}


def settings(**changes: Any) -> Settings:
    return parse_settings(FAST | changes, "test")


@asynccontextmanager
async def operator(
    api: KubeApi, identity: str = "one", chosen: Settings | None = None
) -> AsyncIterator[Operator]:
    configuration = Configuration()
    configuration.host = api.url
    async with ApiClient(configuration) as client:
        made = Operator(client, chosen or settings(), "system", identity, SystemClock())
        task = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def leading(made: Operator) -> None:
    await eventually(
        lambda: not made.ready() and made.metrics.text(leader=False) and made._lease.is_leader, "it leads"
    )


def names(api: KubeApi, kind: Any) -> list[str]:
    return [body["metadata"]["name"] for body in api.objects(kind)]


def reason(api: KubeApi, name: str = "m") -> str:
    conditions = api.get(VLLM_MODELS, "ns", name).get("status", {}).get("conditions", [])
    return next((item["reason"] for item in conditions if item["type"] == "Ready"), "")


def writes(api: KubeApi) -> list[str]:
    return [f"{item.method} {item.path}" for item in api.writes() if "/leases" not in item.path]


async def test_a_models_life(api: KubeApi) -> None:
    """E22, E24"""
    async with operator(api) as made:
        await leading(made)
        api.create(VLLM_MODELS, "ns", model_body())
        await eventually(lambda: reason(api) == "Starting", "the status is written")
        assert names(api, DEPLOYMENTS) == names(api, SERVICES) == ["m-engine"]
        api.delete(DEPLOYMENTS, "ns", "m-engine")
        await eventually(lambda: names(api, DEPLOYMENTS) == ["m-engine"], "the Deployment is back")
        api.patch(VLLM_MODELS, "ns", "m", {"spec": {"replicas": 3}})
        await eventually(
            lambda: api.get(DEPLOYMENTS, "ns", "m-engine")["spec"]["replicas"] == 3, "the edit arrives"
        )
        model = api.get(VLLM_MODELS, "ns", "m")
        assert "annotations" not in model["metadata"]
        assert "finalizers" not in model["metadata"]
        await asyncio.sleep(0.2)
        api.requests.clear()
        api.delete(VLLM_MODELS, "ns", "m")
        await asyncio.sleep(0.3)
        assert names(api, DEPLOYMENTS) == names(api, SERVICES) == []
        assert writes(api) == []


async def test_invalid_models_do_not_hold_up_the_others(api: KubeApi) -> None:
    async with operator(api):
        api.create(VLLM_MODELS, "ns", model_body("bad", engine={"extraArgs": ["--port=1"]}))
        api.create(VLLM_MODELS, "ns", model_body("worse") | {"spec": {"model": [1], "servedNames": {"a": 1}}})
        api.create(VLLM_MODELS, "ns", model_body("good"))
        await eventually(lambda: reason(api, "good") == "Starting")
        await eventually(lambda: reason(api, "bad") == reason(api, "worse") == "InvalidSpec")
        assert names(api, DEPLOYMENTS) == ["good-engine"]


@pytest.mark.parametrize("code", [0, 410, 500])
async def test_watches_that_end_are_survived(api: KubeApi, code: int) -> None:
    """E18"""
    async with operator(api) as made:
        await leading(made)
        api.create(VLLM_MODELS, "ns", model_body("a"))
        await eventually(lambda: reason(api, "a"))
        api.end_watches(code=code)
        api.create(VLLM_MODELS, "ns", model_body("b"))
        await eventually(lambda: reason(api, "b"), "the model after the watch's end")


async def test_an_absent_api_server_is_survived(api: KubeApi) -> None:
    """E19"""
    async with operator(api) as made:
        await leading(made)
        await api.stop_listening()
        await eventually(lambda: not made._lease.is_leader, "the work ends")
        assert made.live() == ""
        await api.start_listening()
        api.create(VLLM_MODELS, "ns", model_body())
        await eventually(lambda: reason(api), "the model is served")


async def test_a_deletion_that_was_missed_is_healed(api: KubeApi) -> None:
    """E18"""
    other = model_body("other", "b", servedNames=["chat"])
    api.create(VLLM_MODELS, "a", model_body("old", "a", servedNames=["chat"]))
    async with operator(api, chosen=settings(resyncSeconds=10)) as made:
        await leading(made)
        await asyncio.sleep(1.1)  # creation times have whole seconds
        api.create(VLLM_MODELS, "b", other)
        await eventually(lambda: api.get(VLLM_MODELS, "b", "other").get("status", {}).get("conditions"))
        assert api.get(VLLM_MODELS, "b", "other")["status"]["servedNames"] == []
        api.end_watches()
        api.delete(VLLM_MODELS, "a", "old")
        api.compact()
        await eventually(
            lambda: api.get(VLLM_MODELS, "b", "other")["status"]["servedNames"] == ["chat"], "healed"
        )


async def test_a_crd_that_comes_late_is_waited_for(api: KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    missing = api.fault(
        "GET", "/vllmmodels", 404, message="the server could not find the requested resource", times=9999
    )
    async with operator(api) as made:
        await asyncio.sleep(0.3)
        assert made.ready() == "the tables are not complete yet"
        await eventually(lambda: "is the chart's definition" in str([vars(item) for item in caplog.records]))
        missing.times = 0
        api.create(VLLM_MODELS, "ns", model_body())
        await eventually(lambda: reason(api), "the model is served")


async def test_a_restart_writes_nothing_but_its_lease(api: KubeApi) -> None:
    for number in range(20):
        api.create(VLLM_MODELS, "ns", model_body(f"m{number}"))
    async with operator(api):
        await eventually(lambda: all(reason(api, f"m{number}") for number in range(20)), "all are served")
        await asyncio.sleep(0.3)
    api.requests.clear()
    async with operator(api, "two") as made:
        await leading(made)
        await asyncio.sleep(1)
    assert writes(api) == []


async def test_writes_per_model_are_bounded(api: KubeApi) -> None:
    async with operator(api) as made:
        await leading(made)
        for number in range(20):
            api.create(VLLM_MODELS, "ns", model_body(f"m{number}"))
        await eventually(lambda: all(reason(api, f"m{number}") for number in range(20)), "all are served")
        await asyncio.sleep(0.5)
    assert len(writes(api)) == 20 * 3


async def test_two_operators_have_one_writer_and_a_quick_heir(api: KubeApi) -> None:
    """E21"""
    async with operator(api, "one") as one:
        await leading(one)
        async with operator(api, "two") as two:
            await eventually(lambda: not two.ready(), "the second stands by, ready")
            assert (one._lease.is_leader, two._lease.is_leader) == (True, False)
            patch = {"spec": {"holderIdentity": "two"}}
            api.patch(LEASES, "system", "vllm-operator", patch)
            await eventually(
                lambda: two._lease.is_leader and not one._lease.is_leader, "the second leads", 10
            )
            api.create(VLLM_MODELS, "ns", model_body())
            await eventually(lambda: reason(api), "the second works")


async def test_only_the_watched_namespaces_are_looked_at(api: KubeApi) -> None:
    async with operator(api, chosen=settings(watchNamespaces=["ns", "ns2"])) as made:
        await leading(made)
        for namespace in ("ns", "ns2", "other"):
            api.create(VLLM_MODELS, namespace, model_body(f"m-{namespace}", namespace))
        await eventually(lambda: len(names(api, DEPLOYMENTS)) == 2)
        await asyncio.sleep(0.2)
        assert sorted(names(api, DEPLOYMENTS)) == ["m-ns-engine", "m-ns2-engine"]
        paths = {item.path for item in api.requests}
        assert not [
            path for path in paths if path.endswith(("/pods", "/nodes")) and "/namespaces/" not in path
        ]


async def test_the_management_port(api: KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vllm_operator")
    async with operator(api) as made:
        api.create(VLLM_MODELS, "ns", model_body())
        await eventually(lambda: reason(api))
        port = next(record.management_port for record in caplog.records if hasattr(record, "management_port"))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            for path in ("/livez", "/readyz"):
                async with http.get(path) as response:
                    assert (response.status, await response.text()) == (200, "ok\n")
            made._lease.last_answer = made._clock.monotonic() - 3600
            made._lease.is_leader = False
            async with http.get("/readyz") as response:
                assert response.status == 503
                assert "the lease has not been read" in await response.text()
            made._lease.is_leader = True
            async with http.get("/metrics") as response:
                text = await response.text()
    for line in (
        'vllm_operator_models{ready="false",reason="Starting"} 1.0',
        'vllm_operator_model_ready{model="ns/m",reason="Starting"} 0.0',
        'vllm_operator_gpus{state="requested"} 1.0',
        "vllm_operator_time_to_ready_seconds_count 0.0",
        "vllm_operator_leader 1.0",
        'vllm_operator_reconciles_total{reason="Starting",result="ok"}',
        "vllm_operator_reconcile_duration_seconds_bucket",
        'vllm_operator_api_errors_total{code="404"}',
    ):
        assert line in text


async def test_a_port_that_is_taken_is_one_line(api: KubeApi) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        made = Operator(
            ApiClient(Configuration()), settings(managementPort=port), "system", "one", SystemClock()
        )
        with pytest.raises(SettingsError, match=f"managementPort: cannot listen on 127.0.0.1:{port}: "):
            await made.run()


def test_a_hung_watch_is_not_alive() -> None:
    made = Operator(ApiClient(Configuration()), settings(), "system", "one", SystemClock())
    assert made.live() == ""

    class Silent:
        def last_activity(self) -> float:
            return made._clock.monotonic() - 600

    made._world = Silent()  # type: ignore[assignment]
    assert made.live().startswith("no watch has been heard of for 600 s")


async def test_the_process_ends_at_sigterm_and_gives_the_lease_back(api: KubeApi, tmp_path: Path) -> None:
    config = tmp_path / "operator.yaml"
    config.write_text("managementPort: 0\nmanagementHost: 127.0.0.1\ngpu: {watchNodes: false}\n")
    env = os.environ | {"KUBECONFIG": str(api.write_kubeconfig(tmp_path / "kube")), "POD_NAMESPACE": "system"}
    command = [sys.executable, "-m", "vllm_operator", "--config", str(config)]
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=subprocess.PIPE)
    try:
        api.create(VLLM_MODELS, "ns", model_body())
        await eventually(lambda: reason(api), "the model is served")
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert api.get(LEASES, "system", "vllm-operator")["spec"]["holderIdentity"] == ""
    assert b'"event": "stopped"' in output
    assert b"t0ken" not in output
