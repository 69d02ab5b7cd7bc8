"""What Prometheus' Kubernetes discovery finds, for a Prometheus that is built without it (Debian's).

Pure: objects as `kubectl get -o json` gives them become target groups of a `static_config`, with the labels
of https://prometheus.io/docs/prometheus/latest/configuration/configuration/#kubernetes_sd_config, as far as
the Prometheus Operator's generator reads them. Nothing is left out here: relabeling keeps or drops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]
Group = dict[str, Any]
META = "__meta_kubernetes_"


@dataclass(frozen=True)
class Objects:
    pods: tuple[Manifest, ...]
    services: tuple[Manifest, ...]
    slices: tuple[Manifest, ...]


def groups(discovery: Manifest, objects: Objects) -> list[Group]:
    """The target groups of one `kubernetes_sd_configs` entry. Raises KeyError for a role unknown here."""
    roles = {"pod": by_pod, "endpointslice": by_slice}
    names = discovery.get("namespaces", {}).get("names")
    found = roles[discovery["role"]](objects)
    return [group for group in found if not names or group["labels"][f"{META}namespace"] in names]


def by_pod(objects: Objects) -> Iterator[Group]:
    """One target for each port of each container."""
    for pod in objects.pods:
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", ()):
                address = f"{pod['status'].get('podIP', '')}:{port['containerPort']}"
                yield group(address, namespace(pod), pod_labels(pod, container, port))


def by_slice(objects: Objects) -> Iterator[Group]:
    """One target for each address and port of each slice, with the labels of its Service and its pod."""
    services = {(namespace(item), item["metadata"]["name"]): item for item in objects.services}
    pods = {(namespace(item), item["metadata"]["name"]): item for item in objects.pods}
    for piece in objects.slices:
        home = namespace(piece)
        service = services.get((home, piece["metadata"]["labels"].get("kubernetes.io/service-name", "")))
        for endpoint in piece.get("endpoints") or ():
            target = endpoint.get("targetRef") or {}
            pod = pods.get((home, target.get("name", "")))
            for port in piece.get("ports") or ():
                labels = {
                    f"{META}endpointslice_port_name": port.get("name", ""),
                    f"{META}endpointslice_address_target_kind": target.get("kind", ""),
                    f"{META}endpointslice_address_target_name": target.get("name", ""),
                }
                labels |= service_labels(service) if service else {}
                labels |= pod_labels(pod, *listening(pod, port["port"])) if pod else {}
                yield group(f"{endpoint['addresses'][0]}:{port['port']}", home, labels)


def listening(pod: Manifest, number: int) -> tuple[Manifest, Manifest]:
    """The container and the port of a pod that a Service's endpoint is at; empty where none declares it."""
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            if port["containerPort"] == number:
                return container, port
    return {}, {}


def group(address: str, home: str, labels: dict[str, str]) -> Group:
    return {"targets": [address], "labels": {f"{META}namespace": home, **labels}}


def namespace(item: Manifest) -> str:
    return str(item["metadata"]["namespace"])


def service_labels(service: Manifest) -> dict[str, str]:
    return {f"{META}service_name": service["metadata"]["name"], **own_labels("service", service)}


def pod_labels(pod: Manifest, container: Manifest, port: Manifest) -> dict[str, str]:
    return {
        f"{META}pod_name": pod["metadata"]["name"],
        f"{META}pod_phase": pod["status"].get("phase", ""),
        f"{META}pod_container_name": container.get("name", ""),
        f"{META}pod_container_port_name": port.get("name", ""),
        f"{META}pod_container_port_number": str(port.get("containerPort", "")),
        **own_labels("pod", pod),
    }


def own_labels(kind: str, item: Manifest) -> dict[str, str]:
    labels: Iterable[tuple[str, str]] = (item["metadata"].get("labels") or {}).items()
    plain = [(re.sub(r"\W", "_", key), value) for key, value in labels]
    present = {f"{META}{kind}_labelpresent_{key}": "true" for key, _ in plain}
    return {f"{META}{kind}_label_{key}": value for key, value in plain} | present
