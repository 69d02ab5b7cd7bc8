"""The life of a release, with a real helm on the real cluster.

Proves: `helm test` streams a chat through the Service, says what to apply where there is no model, and
leaves no pod; an upgrade from an older state of this repository, its chart with its images, brings the new
definition and rights, restarts no model pod and drops no stream, though every pod of ours is replaced under
them; two releases in namespaced mode, the second without the definition, neither see nor reach each other's
models, and one goes without a trace in the other; uninstalling leaves the definition and with it the models
and their pods, which the next install takes up as they are.

The previous release is a pinned commit (releases.PREVIOUS): there is no release yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cluster
import httpx
import pytest
import releases
import yaml
from streams import LONG, Stream, gateway_names, gateway_port

CRD = "vllmmodels.vllm-fleet.dev"
DEFINITION = f"customresourcedefinition.apiextensions.k8s.io/{CRD}"
TENANT = "tenant"
PRESENT_TAG = yaml.safe_load((releases.CHART / "Chart.yaml").read_text())["appVersion"]
KEPT = {
    "lease.coordination.k8s.io/vllm-operator",
    "secret/vllm-fleet-engine-keys",
    "configmap/kube-root-ca.crt",
    "serviceaccount/default",
}
NEW_FIELD = "nodes"  # which the previous release does not know


def engines(model: str) -> dict[str, int]:
    """The engine pods of a model by uid, each with its restarts."""
    return {
        pod["metadata"]["uid"]: sum(c["restartCount"] for c in pod["status"]["containerStatuses"])
        for pod in cluster.engine_pods(model)
    }


def fields() -> set[str]:
    """The fields of a model's spec in the installed definition."""
    definition = cluster.get("crd", CRD)
    assert definition
    (version,) = definition["spec"]["versions"]
    return set(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def images(component: str) -> set[str]:
    """The tags that the component's pods run."""
    pods = releases.component_pods(component)
    return {container["image"].rpartition(":")[2] for pod in pods for container in pod["spec"]["containers"]}


def served_by(service: str, namespace: str) -> set[str]:
    """The models that a gateway lists."""
    with cluster.port_forward(f"svc/{service}", 3000, namespace) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/models", timeout=60).json()
    return {model["name"] for model in answer["models"]}


def ending(namespace: str) -> list[str]:
    """The pods that are being deleted."""
    pods = json.loads(cluster.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" in pod["metadata"]]


def test_helm_test_streams_a_chat(smollm2: str) -> None:
    out = releases.helm("test", "vllm-fleet", "--namespace", cluster.SYSTEM_NAMESPACE, "--logs")
    assert f"default/{smollm2} streamed" in out
    tester = ("pod", "vllm-fleet-test", cluster.SYSTEM_NAMESPACE)
    cluster.eventually(lambda: not cluster.get(*tester), "its pod is gone", 60)


@pytest.fixture
def previous(smollm2: str, tmp_path: Path) -> Iterator[None]:
    """The previous release instead of the present one, which comes back."""
    releases.uninstall()
    releases.install_previous(tmp_path)
    cluster.wait_settled(smollm2)
    yield
    releases.install()


def test_an_upgrade_restarts_no_model_and_drops_no_stream(smollm2: str, previous: None) -> None:
    assert images("operator") == images("gateway") == {releases.PREVIOUS_TAG}
    assert NEW_FIELD not in fields()
    before = engines(smollm2)
    with (
        cluster.watching(f"/api/v1/namespaces/{cluster.SYSTEM_NAMESPACE}/pods") as watch,
        ThreadPoolExecutor(8) as pool,
    ):
        callers = [Caller(watch, pod, length) for pod in gateway_names() for length in (400, 1000)]
        followed = [pool.submit(caller.call) for caller in callers]
        releases.install()
        for done in followed:
            done.result()
        for pod in {caller.pod for caller in callers}:
            last = max(caller.last_end for caller in callers if caller.pod == pod)
            assert told_to_end(watch, pod).at < last, f"no stream was under way as {pod} was told to end"
    assert images("operator") == images("gateway") == {PRESENT_TAG}
    assert NEW_FIELD in fields()
    assert engines(smollm2) == before
    cluster.patch_spec(smollm2, {"gateway": {"weight": 50}})  # the new operator works, with its new rights
    cluster.wait_settled(smollm2)
    cluster.patch_spec(smollm2, {"gateway": None})
    cluster.wait_settled(smollm2)
    assert engines(smollm2) == before


class Caller:
    """Streams through one gateway pod, one answer after another, until the pod is told to end."""

    def __init__(self, watch: cluster.Watch, pod: str, length: int) -> None:
        self.pod, self._watch = pod, watch
        self._body = {**LONG, "max_tokens": length}
        self.last_end = 0.0

    def call(self) -> None:
        """Fails if an answer is not whole."""
        with gateway_port(self.pod) as port:
            while not any(tells_to_end(seen, self.pod) for seen in self._watch.seen):
                stream = Stream(port, self._body)
                stream.assert_whole()
                self.last_end = stream.ended_at


def tells_to_end(seen: cluster.Seen, pod: str) -> bool:
    metadata = seen.body["metadata"]
    return bool(metadata["name"] == pod and "deletionTimestamp" in metadata)


def told_to_end(watch: cluster.Watch, pod: str) -> cluster.Seen:
    return watch.first(lambda seen: tells_to_end(seen, pod), f"{pod} is told to end")


@pytest.fixture
def tenant(smollm2: str) -> Iterator[str]:
    """A second release with a namespace of its own, beside the first, which keeps to `default`."""
    with cluster.lent_namespace(TENANT, releases.RESTRICTED):
        releases.install("--set", "watchNamespaces={default}")
        releases.install(
            *("--set", f"watchNamespaces={{{TENANT}}}", "--set", "crds.enabled=false"),
            *("--set", "gateway.replicas=1"),
            name=TENANT,
            namespace=TENANT,
        )
        yield TENANT
        releases.uninstall(TENANT, TENANT)
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
    cluster.eventually(
        lambda: served_by(f"{tenant}-vllm-fleet-gateway", tenant) == {f"{tenant}/idle"},
        "its gateway has heard of it",
        60,
    )
    assert served_by("vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE) == {f"default/{smollm2}"}
    for release, namespace, own, other in (
        ("vllm-fleet", cluster.SYSTEM_NAMESPACE, "default", tenant),
        (f"{tenant}-vllm-fleet", tenant, tenant, "default"),
    ):
        for account in ("operator", "gateway"):
            assert allowed(release, namespace, account, "list", "vllmmodels.vllm-fleet.dev", own)
            assert not allowed(release, namespace, account, "list", "vllmmodels.vllm-fleet.dev", other)
        assert not allowed(release, namespace, "operator", "list", "pods", other)
    cluster.eventually(lambda: not ending(cluster.SYSTEM_NAMESPACE), "what the upgrade ended is gone", 120)
    first = releases.left_of("vllm-fleet")
    releases.uninstall(tenant, tenant)
    cluster.eventually(lambda: not releases.left_of(tenant), "the second release is gone", 180)
    assert cluster.get("vllm", "idle", tenant), "a model belongs to its user"
    assert releases.left_of("vllm-fleet") == first
    assert engines(smollm2) == pods


def test_uninstalling_leaves_the_definition_and_the_models(smollm2: str) -> None:
    before = engines(smollm2)
    releases.uninstall()
    cluster.eventually(
        lambda: releases.left_of("vllm-fleet") == {DEFINITION}, "only the definition is left", 180, every=1
    )
    assert engines(smollm2) == before
    kinds = "lease,secret,configmap,service,serviceaccount,deployment,poddisruptionbudget,networkpolicy"
    left = cluster.kubectl("-n", cluster.SYSTEM_NAMESPACE, "get", kinds, "-o", "name").split()
    assert set(left) == KEPT  # charts/vllm-fleet/README.md says why
    releases.install()
    cluster.eventually(
        lambda: f"default/{smollm2}" in served_by("vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE),
        "the model is routed again",
        60,
    )
    cluster.wait_settled(smollm2)
    assert engines(smollm2) == before
