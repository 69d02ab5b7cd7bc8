"""Whether the nodes have the GPUs that a pod asks for, before the scheduler has been asked.

Advice, never a gate: an autoscaler may add a node, and affinity is not judged, so a model that fits nowhere
is applied all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_operator.render.facts import Holder, Node
from vllm_operator.render.requests import counted
from vllm_operator.render.scheduling import suitable_nodes

# Of one GPU of the node, in MiB: https://github.com/NVIDIA/k8s-device-plugin (gpu-feature-discovery)
MEMORY_LABEL = "nvidia.com/gpu.memory"
MAX_HOLDERS = 3
MiB = 2**20


def gpu_shortage(
    pod: Mapping[str, Any],
    resource: str,
    count: int,
    nodes: Iterable[Node],
    holders: Callable[[str, str], Iterable[Holder]],
    namespace: str,
) -> str:
    """Why no node has `count` free of `resource` for a pod's spec, for a condition; empty where one has.

    Pods are named inside the model's own namespace; of others there is only how much they hold.
    """
    fitting = suitable_nodes(dict(pod), nodes)
    if not fitting:
        return "No node matches the selectors and taints."
    best = min(fitting, key=lambda node: (-node.free.get(resource, 0), node.name))
    free = max(best.free.get(resource, 0), 0)
    if free >= count:
        return ""
    held = _held_by(list(holders(best.name, resource)), namespace)
    return f"The model asks for {count} {resource} per pod; {best.name} has most free: {free}{held}."


def _held_by(holders: list[Holder], namespace: str) -> str:
    own = [holder for holder in holders if holder.namespace == namespace]
    elsewhere = sum(holder.count for holder in holders if holder.namespace != namespace)
    told = [f"{holder.name} holds {holder.count}" for holder in own[:MAX_HOLDERS]]
    if rest := sum(holder.count for holder in own[MAX_HOLDERS:]):
        told.append(f"other pods here hold {rest}")
    if elsewhere:
        told.append(f"other namespaces hold {elsewhere}")
    return f" ({', '.join(told)})" if told else ""


def memory_shortage(
    pod: Mapping[str, Any], resource: str, count: int, memory: str, nodes: Iterable[Node]
) -> str:
    """Why the GPUs are too small for `memory` bytes each; empty where one node's are not, or none says."""
    needed = counted({"memory": memory})["memory"]
    sizes = {
        node.name: int(label)
        for node in suitable_nodes(dict(pod), nodes)
        if node.offers.get(resource, 0) >= count and (label := node.labels.get(MEMORY_LABEL, "")).isdecimal()
    }
    if not sizes or max(sizes.values()) * MiB >= needed:
        return ""
    name = max(sizes, key=lambda node: (sizes[node], node))
    return (
        f"gpu.memory asks for {memory} on each GPU, and the largest that fit have {sizes[name]}Mi ({name}): "
        "use more GPUs by engine.tensorParallelSize, or engine.quantization."
    )
