"""What NetworkPolicies allow, computed: for clusters whose network plugin does not enforce them.

The rules are those of https://kubernetes.io/docs/concepts/services-networking/network-policies/: policies add
up, one that selects a pod closes it to what no rule names, and both ends must agree. Traffic between a pod
and its own node is always allowed, so probes are no case here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Manifest = Mapping[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Pod:
    """One end of a connection; `ports` are its named ports. An address outside the cluster has no labels."""

    namespace: str
    labels: Labels
    ports: Mapping[str, int] = field(default_factory=dict)
    ip: str = "10.244.0.9"

    @classmethod
    def of(cls, manifest: Manifest) -> Pod:
        """From a pod of the API server, or from a manifest with a pod's `metadata` and `spec`."""
        metadata, spec = manifest["metadata"], manifest["spec"]
        ports = {
            port["name"]: int(port["containerPort"])
            for container in spec["containers"]
            for port in container.get("ports", ())
            if "name" in port
        }
        return cls(metadata["namespace"], metadata.get("labels", {}), ports)


@dataclass(frozen=True)
class Network:
    """All policies of a cluster, and the labels of its namespaces by name."""

    policies: tuple[Manifest, ...]
    namespaces: Mapping[str, Labels]

    def allows(self, source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection from one pod to a port of another comes about."""
        wanted = (port, protocol)
        return self._open(target, "Ingress", source, target, wanted) and self._open(
            source, "Egress", target, target, wanted
        )

    def _open(self, pod: Pod, direction: str, peer: Pod, target: Pod, wanted: tuple[int, str]) -> bool:
        selecting = [policy for policy in self.policies if self._selects(policy, pod, direction)]
        key, side = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
        rules = [rule for policy in selecting for rule in policy["spec"].get(key) or ()]
        return not selecting or any(
            self._peer(rule.get(side), peer, pod.namespace) and _port(rule.get("ports"), target, wanted)
            for rule in rules
        )

    def _selects(self, policy: Manifest, pod: Pod, direction: str) -> bool:
        spec = policy["spec"]
        default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
        here = policy["metadata"]["namespace"] == pod.namespace
        return (
            here
            and direction in spec.get("policyTypes", default)
            and selects(spec["podSelector"], pod.labels)
        )

    def _peer(self, peers: Iterable[Manifest] | None, pod: Pod, home: str) -> bool:
        return not peers or any(self._is(peer, pod, home) for peer in peers)

    def _is(self, peer: Manifest, pod: Pod, home: str) -> bool:
        if block := peer.get("ipBlock"):
            return _within(pod.ip, block["cidr"]) and not any(
                _within(pod.ip, cidr) for cidr in block.get("except", ())
            )
        if pod.namespace not in self.namespaces:
            return False
        selector = peer.get("namespaceSelector")
        place = (
            pod.namespace == home if selector is None else selects(selector, self.namespaces[pod.namespace])
        )
        return place and selects(peer.get("podSelector") or {}, pod.labels)


def selects(selector: Manifest, labels: Labels) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    wanted = (selector.get("matchLabels") or {}).items()
    return wanted <= dict(labels).items() and all(
        _expression(expression, labels) for expression in selector.get("matchExpressions") or ()
    )


def _expression(expression: Manifest, labels: Labels) -> bool:
    value = labels.get(expression["key"])
    return {
        "In": value in expression.get("values", ()),
        "NotIn": value not in expression.get("values", ()),
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]


def _port(ports: Iterable[Manifest] | None, target: Pod, wanted: tuple[int, str]) -> bool:
    number, protocol = wanted
    return not ports or any(
        port.get("protocol", "TCP") == protocol and _number(port, target, number) for port in ports
    )


def _number(port: Manifest, target: Pod, number: int) -> bool:
    named = port.get("port")
    if isinstance(named, str):
        return target.ports.get(named) == number
    return named is None or named <= number <= port.get("endPort", named)


def _within(ip: str, cidr: str) -> bool:
    return ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)
