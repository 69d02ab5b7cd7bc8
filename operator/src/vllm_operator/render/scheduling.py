"""GPUs and nodes: what a pod asks the scheduler for, and whether a node could give it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest, Node, Taint
from vllm_operator.render.requests import requested
from vllm_operator.settings import Settings

# What the vendors' node labellers write, by the domain of the resource.
PRODUCT_LABELS = {
    "nvidia.com": "nvidia.com/gpu.product",
    "amd.com": "amd.com/gpu.product-name",
    "gpu.intel.com": "gpu.intel.com/product",
}


def gpu_resource(spec: Spec, settings: Settings) -> str:
    return spec.gpu.resource or settings.gpu.resource


def container_resources(spec: Spec, settings: Settings) -> Manifest:
    """GPUs stand in the limits alone: the API server makes requests of extended resources equal to them."""
    limits: dict[str, int | str] = dict(spec.resources.limits)
    if spec.gpu_count:
        limits[gpu_resource(spec, settings)] = spec.gpu_count
    parts = {"limits": limits, "requests": dict(spec.resources.requests)}
    found: Manifest = {
        name: {key: str(value) for key, value in sorted(part.items())} for name, part in parts.items() if part
    }
    claims = [{"name": claim.name} for claim in spec.resource_claims]
    return found | ({"claims": claims} if claims else {})


def product_label(spec: Spec, settings: Settings) -> str:
    """The same for all of a vendor's resources: nvidia.com/mig-1g.5gb and nvidia.com/gpu.shared too."""
    vendor = gpu_resource(spec, settings).split("/", 1)[0]
    return settings.gpu.product_labels.get(vendor) or PRODUCT_LABELS.get(vendor, f"{vendor}/gpu.product")


def node_selector(spec: Spec, settings: Settings) -> dict[str, str]:
    product = {product_label(spec, settings): spec.gpu.product} if spec.gpu.product else {}
    return {**spec.scheduling.node_selector, **product}


def tolerations(spec: Spec, settings: Settings) -> list[Manifest]:
    """The spec's, and the taint that GPU nodes commonly have (<vendor>/gpu) for those who ask for a GPU."""
    own: list[Manifest] = [
        item.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)
        for item in spec.scheduling.tolerations
    ]
    if spec.gpu_count or spec.resource_claims:
        vendor = gpu_resource(spec, settings).split("/", 1)[0]
        usual = {"key": f"{vendor}/gpu", "operator": "Exists", "effect": "NoSchedule"}
        own += [usual] if usual not in own else []
    return own


def pod_placement(spec: Spec, settings: Settings) -> Manifest:
    """The fields of a pod's spec that decide on its node; those that are empty are left out."""
    scheduling = spec.scheduling
    claims = [claim.model_dump(by_alias=True, exclude_none=True) for claim in spec.resource_claims]
    fields: dict[str, Any] = {
        "nodeSelector": node_selector(spec, settings),
        "tolerations": tolerations(spec, settings),
        "resourceClaims": claims,
        "affinity": scheduling.affinity,
        "topologySpreadConstraints": list(scheduling.topology_spread_constraints),
        "priorityClassName": scheduling.priority_class_name,
        "runtimeClassName": scheduling.runtime_class_name,
        "schedulerName": scheduling.scheduler_name,
    }
    return {name: value for name, value in fields.items() if value}


def suitable_nodes(pod: Manifest, nodes: Iterable[Node]) -> list[Node]:
    """Nodes that a pod (its spec) may run on by selector and taints. Affinity is not judged."""
    selector, tolerated = pod.get("nodeSelector") or {}, pod.get("tolerations") or []
    bearable = functools.cache(lambda taints: all(_tolerated(taint, tolerated) for taint in taints))
    return [
        node
        for node in nodes
        if node.schedulable
        and all(node.labels.get(key) == value for key, value in selector.items())
        and bearable(node.taints)  # many nodes, few kinds of nodes
    ]


def shortage(pod: Manifest, nodes: Iterable[Node]) -> str:
    """Why one more such pod finds no place now; empty where it does."""
    suitable = suitable_nodes(pod, nodes)
    if not suitable:
        return "no node matches the selectors and taints"
    asked = requested(pod)
    if any(all(node.free.get(name, 0) >= count for name, count in asked.items()) for node in suitable):
        return ""
    lacking = [[name for name, count in asked.items() if count > node.free.get(name, 0)] for node in suitable]
    nearest, node = min(zip(lacking, suitable, strict=True), key=lambda pair: (len(pair[0]), pair[1].name))
    return f"no node has room for one more pod; {node.name} lacks free {' and '.join(sorted(nearest))}"


def _tolerated(taint: Taint, tolerated: Iterable[Mapping[str, Any]]) -> bool:
    return taint.effect == "PreferNoSchedule" or any(_matches(taint, item) for item in tolerated)


def _matches(taint: Taint, item: Mapping[str, Any]) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/"""
    if item.get("effect") not in (None, taint.effect) or item.get("key") not in (None, taint.key):
        return False
    return item.get("operator") == "Exists" or item.get("value", "") == taint.value
