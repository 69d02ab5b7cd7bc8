"""The life of a release, with a real helm on the real cluster.

Proves: `helm test` streams a chat through the Service, says what to apply where there is no model, and leaves
no pod; an upgrade from a chart with an older definition brings the new one, restarts no model pod and drops
no stream, though every pod of ours is replaced; two releases in namespaced mode, the second without the
definition, neither see nor reach each other's models, and one goes without a trace in the other; uninstalling
leaves the definition and with it the models and their pods, which the next install takes up as they are.

The previous chart is this one with another version, configuration and definition: there is no release yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cluster
import httpx
import pytest
import releases
from streams import LONG, Stream, gateway_pod, gateways_ready

CRD = "vllmmodels.vllm-fleet.dev"
DEFINITION = f"customresourcedefinition.apiextensions.k8s.io/{CRD}"
TENANT = "tenant"
COLUMN = "GPUs"


def engines(model: str) -> dict[str, int]:
    """The engine pods of a model by uid, each with its restarts."""
    return {
        pod["metadata"]["uid"]: sum(c["restartCount"] for c in pod["status"]["containerStatuses"])
        for pod in cluster.engine_pods(model)
    }


def columns() -> list[str]:
    definition = cluster.get("crd", CRD)
    assert definition
    (version,) = definition["spec"]["versions"]
    return [column["name"] for column in version["additionalPrinterColumns"]]


def served_by(service: str, namespace: str) -> set[str]:
    """The models that a gateway lists."""
    with cluster.port_forward(f"svc/{service}", 3000, namespace) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/models", timeout=10).json()
    return {model["name"] for model in answer["models"]}


def test_helm_test_streams_a_chat(smollm2: str) -> None:
    out = releases.helm("test", "vllm-fleet", "--namespace", cluster.SYSTEM_NAMESPACE, "--logs")
    assert f"default/{smollm2} streamed" in out
    assert not cluster.get("pod", "vllm-fleet-test", cluster.SYSTEM_NAMESPACE)


def test_an_upgrade_restarts_no_model_and_drops_no_stream(smollm2: str, tmp_path: Path) -> None:
    debug = ("--set", "gateway.config.logLevel=debug", "--set", "operator.config.logLevel=debug")
    releases.install(*debug, chart=releases.older_chart(tmp_path, COLUMN))
    assert COLUMN not in columns()
    before = engines(smollm2)
    with gateway_pod() as (pod, port):
        stream = Stream(port, {**LONG, "max_tokens": 700})
        stream.wait_for_tokens(3)
        releases.install()
        ending = cluster.get("pod", pod, cluster.SYSTEM_NAMESPACE)
        assert not ending or "deletionTimestamp" in ending["metadata"], "the gateway was not replaced"
        stream.assert_whole()
    assert COLUMN in columns()
    assert engines(smollm2) == before
    cluster.eventually(gateways_ready, "all gateways ready", 60)


@pytest.fixture
def tenant(smollm2: str) -> Iterator[str]:
    """A second release with a namespace of its own, beside the first, which keeps to `default`."""
    cluster.apply(releases.namespace(TENANT))
    releases.install("--set", "watchNamespaces={default}")
    releases.install(
        *("--set", f"watchNamespaces={{{TENANT}}}", "--set", "crds.enabled=false"),
        *("--set", "gateway.replicas=1"),
        name=TENANT,
        namespace=TENANT,
    )
    yield TENANT
    releases.uninstall(TENANT, TENANT)
    cluster.delete("namespace", TENANT, "default", "--wait=false")
    releases.install()


def allowed(release: str, namespace: str, account: str, verb: str, what: str, where: str) -> bool:
    user = f"system:serviceaccount:{namespace}:{release}-{account}"
    arguments = ("auth", "can-i", verb, what, "-n", where, f"--as={user}")
    return cluster.run(cluster.tool("kubectl"), *arguments, check=False).stdout.strip() == "yes"


def test_two_namespaced_releases_do_not_touch_each_other(smollm2: str, tenant: str) -> None:
    pods = engines(smollm2)
    assert "No VLLMModel is served yet" in releases.helm("test", tenant, "-n", tenant, "--logs")
    idle = cluster.example("smollm2.yaml")
    idle["metadata"]["name"] = "idle"
    idle["spec"] |= {"replicas": 0, "servedNames": [smollm2]}  # the name that the other release has as well
    cluster.apply(idle, tenant)
    cluster.eventually(lambda: cluster.settled("idle", tenant), "the second operator works", 60)
    assert served_by("vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE) == {f"default/{smollm2}"}
    assert served_by(f"{tenant}-vllm-fleet-gateway", tenant) == {f"{tenant}/idle"}
    for release, namespace, own, other in (
        ("vllm-fleet", cluster.SYSTEM_NAMESPACE, "default", tenant),
        (f"{tenant}-vllm-fleet", tenant, tenant, "default"),
    ):
        for account in ("operator", "gateway"):
            assert allowed(release, namespace, account, "list", "vllmmodels.vllm-fleet.dev", own)
            assert not allowed(release, namespace, account, "list", "vllmmodels.vllm-fleet.dev", other)
        assert not allowed(release, namespace, "operator", "list", "pods", other)
    first = releases.left_of("vllm-fleet")
    releases.uninstall(tenant, tenant)
    cluster.eventually(lambda: not releases.left_of(tenant), "the second release is gone", 60)
    assert cluster.get("vllm", "idle", tenant), "a model belongs to its user"
    assert releases.left_of("vllm-fleet") == first
    assert engines(smollm2) == pods


def test_uninstalling_leaves_the_definition_and_the_models(smollm2: str) -> None:
    before = engines(smollm2)
    releases.uninstall()
    cluster.eventually(
        lambda: releases.left_of("vllm-fleet") == {DEFINITION}, "only the definition is left", 90, every=1
    )
    assert engines(smollm2) == before
    releases.install()
    cluster.eventually(
        lambda: f"default/{smollm2}" in served_by("vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE),
        "the model is routed again",
        30,
    )
    cluster.wait_settled(smollm2, seconds=30)
    assert engines(smollm2) == before
