"""Who may reach whom, by the policies and the pods that are in the cluster.

The bridge plugin of the local cluster does not enforce NetworkPolicies: what they mean is computed from the
real objects: policies of chart and operator, labels and ports of running pods, labels of their namespaces.
tests/chart has the same over many values, and the evaluator's own tests.

Proves: a model's pods take connections from the gateway and from Prometheus, and from no other pod; metrics
are for Prometheus and the operator; the API is for everyone; each pod of ours is covered by a policy.
"""

from __future__ import annotations

import json

import cluster
import pytest
from network_policy import Network, Pod, selects

STRANGER = Pod("default", {"app": "anything"})
PROMETHEUS = Pod("default", {"app.kubernetes.io/name": "prometheus"})


@pytest.fixture(scope="module")
def network(smollm2: str) -> Network:
    policies = json.loads(cluster.kubectl("get", "networkpolicies", "-A", "-o", "json"))["items"]
    namespaces = json.loads(cluster.kubectl("get", "namespaces", "-o", "json"))["items"]
    labels = {item["metadata"]["name"]: item["metadata"]["labels"] for item in namespaces}
    return Network(tuple(policies), labels)


def ours(component: str) -> Pod:
    selector = f"app.kubernetes.io/component={component}"
    return Pod.of(cluster.items("pods", selector, cluster.SYSTEM_NAMESPACE)[0])


def test_a_model_takes_the_gateway_and_prometheus_only(network: Network, smollm2: str) -> None:
    engine = Pod.of(cluster.engine_pods(smollm2)[0])
    assert network.allows(ours("gateway"), engine, 8000)
    assert network.allows(PROMETHEUS, engine, 8000)
    for caller in (STRANGER, ours("operator"), engine, Pod("default", ours("gateway").labels)):
        assert not network.allows(caller, engine, 8000)


def test_metrics_are_for_prometheus_and_the_operator(network: Network) -> None:
    gateway, operator = ours("gateway"), ours("operator")
    assert network.allows(PROMETHEUS, gateway, 9090)
    assert network.allows(PROMETHEUS, operator, 9090)
    assert network.allows(operator, gateway, 9090)
    assert not network.allows(STRANGER, gateway, 9090)
    assert not network.allows(STRANGER, operator, 9090)
    assert network.allows(STRANGER, gateway, 3000)


def test_every_pod_of_ours_is_covered(network: Network, smollm2: str) -> None:
    pods = [ours("gateway"), ours("operator"), *map(Pod.of, cluster.engine_pods(smollm2))]
    for pod in pods:
        assert any(
            policy["metadata"]["namespace"] == pod.namespace
            and selects(policy["spec"]["podSelector"], pod.labels)
            for policy in network.policies
        ), pod
