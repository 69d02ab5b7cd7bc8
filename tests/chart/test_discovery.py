"""The discovery that the monitoring tests give to a Prometheus without one (tests/e2e/discovery.py).

Proves: a pod gives a target for each port of each container, a slice one for each address and port; their
labels are those that Prometheus documents, escaped as it does; namespaces narrow both; a role that is not
known is an error, not an empty list.
"""

from __future__ import annotations

from typing import Any

import pytest
from discovery import Objects, groups

POD: dict[str, Any] = {
    "metadata": {"name": "p", "namespace": "a", "labels": {"app.kubernetes.io/name": "x"}},
    "spec": {
        "containers": [
            {"name": "main", "ports": [{"name": "http", "containerPort": 8000}, {"containerPort": 9}]},
            {"name": "other"},
        ]
    },
    "status": {"podIP": "10.0.0.1", "phase": "Running"},
}
SERVICE: dict[str, Any] = {
    "metadata": {"name": "s", "namespace": "a", "labels": {"vllm-fleet.dev/m": "true"}}
}
SLICE: dict[str, Any] = {
    "metadata": {"name": "s-1", "namespace": "a", "labels": {"kubernetes.io/service-name": "s"}},
    "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "p"}}],
    "ports": [{"name": "metrics", "port": 8000}],
}
OBJECTS = Objects((POD,), (SERVICE,), (SLICE,))


def test_a_pod_is_a_target_for_each_port() -> None:
    first, second = groups({"role": "pod"}, OBJECTS)
    assert (first["targets"], second["targets"]) == (["10.0.0.1:8000"], ["10.0.0.1:9"])
    assert first["labels"] == {
        "__meta_kubernetes_namespace": "a",
        "__meta_kubernetes_pod_name": "p",
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_container_name": "main",
        "__meta_kubernetes_pod_container_port_name": "http",
        "__meta_kubernetes_pod_container_port_number": "8000",
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": "x",
        "__meta_kubernetes_pod_labelpresent_app_kubernetes_io_name": "true",
    }


def test_a_slice_is_a_target_with_its_service_and_pod() -> None:
    (found,) = groups({"role": "endpointslice"}, OBJECTS)
    wanted = {
        "__meta_kubernetes_service_name": "s",
        "__meta_kubernetes_service_label_vllm_fleet_dev_m": "true",
        "__meta_kubernetes_service_labelpresent_vllm_fleet_dev_m": "true",
        "__meta_kubernetes_endpointslice_port_name": "metrics",
        "__meta_kubernetes_endpointslice_address_target_kind": "Pod",
        "__meta_kubernetes_endpointslice_address_target_name": "p",
        "__meta_kubernetes_pod_name": "p",
        "__meta_kubernetes_pod_container_name": "main",
    }
    assert found["targets"] == ["10.0.0.1:8000"]
    assert wanted.items() <= found["labels"].items()


@pytest.mark.parametrize("role", ["pod", "endpointslice"])
def test_namespaces_narrow(role: str) -> None:
    assert groups({"role": role, "namespaces": {"names": ["b"]}}, OBJECTS) == []
    assert groups({"role": role, "namespaces": {"names": ["a"]}}, OBJECTS)


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(KeyError):
        groups({"role": "node"}, OBJECTS)
