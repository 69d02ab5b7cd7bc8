"""The chart and the examples before a real API server and a real helm.

Proves: whatever the matrix of values renders, the API server accepts strictly, with the monitors and rules of
the Prometheus Operator and the routes of the Gateway API, and Pod Security "restricted" has nothing to warn
of; a monitor or rule with a fault would be refused; helm refuses a Kubernetes older than 1.30; the library
that the offline tests render with gives what the helm command gives; k8s/install.yaml and
k8s/kustomization.yaml are accepted; every example passes the definition's schema and rules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import definitions
import pytest
import yaml

import helm

pytestmark = pytest.mark.e2e
NAMESPACE = "vllm-fleet-chart"
SOON = {"alert": "A", "expr": "up", "for": "soon"}
MONITORING_API = "monitoring.coreos.com/v1"
MATRIX = yaml.safe_load((cluster.ROOT / "tests" / "chart" / "matrix.yaml").read_text())
DRY_RUN = ("apply", "--dry-run=server", "--server-side", "--force-conflicts", "--validate=strict")


@pytest.fixture(scope="module")
def gateway_api(release: None) -> Iterator[None]:
    route = "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"
    with definitions.installed(definitions.module_file("sigs.k8s.io/gateway-api", route)):
        yield


@pytest.fixture(scope="module")
def monitoring_api(release: None) -> Iterator[None]:
    with definitions.installed(definitions.MONITORING.read_text()):
        yield


@pytest.fixture(scope="module")
def namespace(release: None) -> Iterator[str]:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    with cluster.lent_namespace(NAMESPACE, labels) as name:
        yield name


def in_order(text: str) -> list[str]:
    return sorted(json.dumps(manifest, sort_keys=True) for manifest in helm.manifests(text))


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_the_api_server_accepts_what_is_rendered(
    namespace: str, gateway_api: None, monitoring_api: None, values: dict[str, Any]
) -> None:
    here = values | ({"watchNamespaces": [namespace]} if values.get("watchNamespaces") else {})
    release = helm.Release("matrix", namespace, (MONITORING_API,), kube_version="v1.37.0")
    text = helm.binary_helm(helm.find_binary()).template(here, release)
    assert in_order(text) == in_order(helm.library_helm().template(here, release))
    manifests = helm.manifests(text)
    done = cluster.run(cluster.tool("kubectl"), *DRY_RUN, "-f", "-", stdin=listed(manifests))
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(manifests)
    wanted = values.get("monitoring", {}).get("monitors", True)
    assert monitors(manifests) == ({"PodMonitor": 1, "ServiceMonitor": 2} if wanted else {})


def listed(manifests: list[helm.Manifest]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})


def monitors(manifests: list[helm.Manifest]) -> Counter[str]:
    return Counter(m["kind"] for m in manifests if m["kind"].endswith("Monitor"))


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        ("ServiceMonitor", {"endpoints": [{"port": "metrics", "scheme": "ftp"}]}, "spec.endpoints[0].scheme"),
        ("PodMonitor", {"podMetricsEndpoints": [{"interval": "1 minute"}]}, "spec.podMetricsEndpoints[0]"),
        ("PrometheusRule", {"groups": [{"name": "g", "rules": [SOON]}]}, "spec.groups[0].rules[0].for"),
    ],
)
def test_the_api_server_refuses_a_wrong_monitor(
    namespace: str, monitoring_api: None, kind: str, wrong: dict[str, Any], said: str
) -> None:
    release = helm.Release("matrix", namespace, (MONITORING_API,))
    rendered = helm.manifests(helm.library_helm().template({}, release))
    manifest = next(m for m in rendered if m["kind"] == kind)
    manifest["spec"] |= wrong
    refused = cluster.run(cluster.tool("kubectl"), *DRY_RUN, "-f", "-", stdin=listed([manifest]), check=False)
    assert refused.returncode != 0
    assert said in refused.stderr


@pytest.mark.parametrize("chart", [helm.CHART, helm.MODELS_CHART], ids=lambda chart: chart.name)
def test_an_older_kubernetes_is_refused(chart: Path) -> None:
    """By helm itself, and not by the library, which does not look at kubeVersion."""
    command = helm.binary_helm(helm.find_binary(), chart)
    command.template({}, helm.Release(kube_version=helm.OLDEST_KUBERNETES))
    too_old = r"chart requires kubeVersion: >=1\.30-0 which is incompatible with Kubernetes v1\.29\.9"
    with pytest.raises(helm.HelmError, match=too_old):
        command.template({}, helm.Release(kube_version="v1.29.9"))


def test_the_api_server_accepts_the_plain_manifests(release: None) -> None:
    kustomization = str(cluster.ROOT / "k8s")
    out = cluster.kubectl(*DRY_RUN, "-k", kustomization)
    documents = helm.manifests((cluster.ROOT / "k8s" / "install.yaml").read_text())
    assert len(out.splitlines()) == len(documents)


@pytest.mark.parametrize("file", sorted(path.name for path in cluster.EXAMPLES.glob("*.yaml")))
def test_the_api_server_accepts_the_example(namespace: str, file: str) -> None:
    path = str(cluster.EXAMPLES / file)
    done = cluster.run(cluster.tool("kubectl"), "-n", namespace, *DRY_RUN, "-f", path)
    assert "serverside-applied (server dry run)" in done.stdout
    assert done.stderr == ""
