"""GPUs and nodes: what a pod asks the scheduler for, and whether a node could give it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest, Node, Taint
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


def suitable_nodes(spec: Spec, settings: Settings, nodes: Iterable[Node]) -> list[Node]:
    """Nodes that the pods may run on by selector and taints, most free GPUs first. Affinity is not judged."""
    selector, tolerated = node_selector(spec, settings), tolerations(spec, settings)
    fitting = [
        node
        for node in nodes
        if node.schedulable
        and all(node.labels.get(key) == value for key, value in selector.items())
        and all(_tolerated(taint, tolerated) for taint in node.taints)
    ]
    resource = gpu_resource(spec, settings)
    return sorted(fitting, key=lambda node: (-node.free.get(resource, 0), node.name))


def spare_gpu_fits(spec: Spec, settings: Settings, nodes: Iterable[Node]) -> bool:
    """Whether one more pod finds its GPUs on one node now."""
    suitable = suitable_nodes(spec, settings, nodes)
    return bool(suitable) and suitable[0].free.get(gpu_resource(spec, settings), 0) >= spec.gpu_count


def _tolerated(taint: Taint, tolerated: Iterable[Mapping[str, Any]]) -> bool:
    return taint.effect == "PreferNoSchedule" or any(_matches(taint, item) for item in tolerated)


def _matches(taint: Taint, item: Mapping[str, Any]) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/"""
    if item.get("effect") not in (None, taint.effect) or item.get("key") not in (None, taint.key):
        return False
    return item.get("operator") == "Exists" or item.get("value", "") == taint.value
