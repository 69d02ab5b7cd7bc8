"""GPU fit before the scheduler has spoken, and GPU memory: words for a condition, never a gate.

Proves: the count per node, within the selectors and taints; who holds the GPUs, by name only in the model's
own namespace; nothing where a node has them; the memory of one GPU against the nodes' label, over the nodes
that could ever take the pod; nothing where no node says; in a status before there are pods, and in Accepted;
the objects are applied all the same.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_clock import eventually
from operator_rig import NODES, PODS, Rig

from vllm_operator.observe.fit import MEMORY_LABEL, gpu_shortage, memory_shortage
from vllm_operator.render.facts import Holder, Node, Taint

GPU = "nvidia.com/gpu"


def node(name: str, free: int, *, of: int = 8, **changes: Any) -> Node:
    fields: dict[str, Any] = {"labels": {}, "taints": (), "schedulable": True} | changes
    return Node(name=name, free={GPU: free}, offers={GPU: of}, **fields)


def shortage(*nodes: Node, holders: tuple[Holder, ...] = (), count: int = 2, **pod: Any) -> str:
    return gpu_shortage(pod, GPU, count, nodes, lambda _node, _resource: holders, "ns")


def test_nothing_is_said_where_a_node_has_them() -> None:
    assert shortage(node("a", 0), node("b", 2)) == ""


def test_the_best_node_is_named() -> None:
    text = shortage(node("a", 0), node("b", 1), node("c", 1))
    assert text == "The model asks for 2 nvidia.com/gpu per pod; b has most free: 1."


def test_an_overcommitted_node_has_none_free() -> None:
    assert shortage(node("a", -3)).endswith("a has most free: 0.")


@pytest.mark.parametrize(
    ("other", "pod"),
    [
        (node("b", 8, labels={"pool": "x"}), {"nodeSelector": {"pool": "y"}}),
        (node("b", 8, taints=(Taint("k", "", "NoSchedule"),)), {}),
        (node("b", 8, schedulable=False), {}),
    ],
)
def test_only_nodes_that_may_take_the_pod_count(other: Node, pod: dict[str, Any]) -> None:
    assert shortage(other, **pod) == "No node matches the selectors and taints."
    mine = node("a", 1, labels=pod.get("nodeSelector", {}))
    assert shortage(other, mine, **pod).endswith("a has most free: 1.")


def test_holders_are_named_in_the_models_namespace_alone() -> None:
    holders = (
        Holder("ns", "first", 3),
        Holder("other", "stranger", 2),
        Holder("ns", "second", 1),
        Holder("ns", "third", 1),
        Holder("ns", "fourth", 1),
    )
    text = shortage(node("a", 0), holders=holders)
    assert text.endswith(
        "a has most free: 0 (first holds 3, second holds 1, third holds 1, other pods here hold 1, "
        "other namespaces hold 2)."
    )
    assert "stranger" not in text


def memory(*nodes: Node, needs: str = "70Gi", count: int = 1, **pod: Any) -> str:
    return memory_shortage(pod, GPU, count, needs, nodes)


def sized(name: str, mebibytes: object, **changes: Any) -> Node:
    return node(name, 0, labels={MEMORY_LABEL: str(mebibytes)}, **changes)


def test_memory_of_the_largest_gpu_counts() -> None:
    assert memory(sized("a", 24576), sized("b", 81559)) == ""
    text = memory(sized("a", 24576), sized("b", 40960))
    assert "gpu.memory asks for 70Gi on each GPU, and the largest that fit have 40960Mi (b)" in text
    assert "engine.tensorParallelSize" in text
    assert memory(sized("a", 40960), needs="40Gi") == ""


@pytest.mark.parametrize("label", ["", "much", "-1"])
def test_nothing_is_said_where_no_node_says(label: str) -> None:
    assert memory(sized("a", label)) == ""
    assert memory(node("a", 8)) == ""


def test_nodes_that_never_fit_say_nothing_of_memory() -> None:
    big = sized("big", 81559, taints=(Taint("k", "", "NoSchedule"),))
    assert "(a)" in memory(big, sized("a", 24576))
    assert "(a)" in memory(sized("big", 81559, of=1), sized("a", 24576), count=2)
    assert memory(big) == ""


async def cluster_of_one(rig: Rig, mebibytes: int) -> None:
    ready = {"type": "Ready", "status": "True"}
    status = {"allocatable": {GPU: "4", "cpu": "8", "memory": "64Gi"}, "conditions": [ready]}
    labels = {MEMORY_LABEL: str(mebibytes)}
    rig.api.create(NODES, "", {"metadata": {"name": "gpu-1", "labels": labels}, "status": status})
    for namespace, name in (("ns", "neighbour"), ("other", "stranger")):
        limits = {"limits": {GPU: "2"}}
        spec = {"nodeName": "gpu-1", "containers": [{"name": "c", "resources": limits}]}
        rig.api.create(
            PODS, namespace, {"metadata": {"name": name}, "spec": spec, "status": {"phase": "Running"}}
        )
    await eventually(rig.world.nodes, "the nodes are known")


async def test_a_model_that_finds_no_gpu_says_so_before_its_pods_do(rig: Rig) -> None:
    await cluster_of_one(rig, 40960)
    rig.model(gpu={"memory": "70Gi"})
    await rig.reconcile()
    assert rig.deployment()
    status, reason, message = rig.condition("Reconciling")
    assert (status, reason) == ("True", "Starting")
    assert "gpu-1 has most free: 0 (neighbour holds 2, other namespaces hold 2)." in message
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")
    assert "the largest that fit have 40960Mi (gpu-1)" in rig.condition("Accepted")[2]
    rig.api.delete(PODS, "other", "stranger")
    await rig.reconcile()
    assert "has most free" not in rig.condition("Reconciling")[2]


async def test_a_pod_that_ends_holds_nothing(rig: Rig) -> None:
    await cluster_of_one(rig, 81559)
    for namespace, name in (("ns", "neighbour"), ("other", "stranger")):
        rig.api.patch_status(PODS, namespace, name, {"phase": "Succeeded"})
    await rig.caught_up()
    assert rig.world.holders("gpu-1", GPU) == ()
    rig.api.delete(PODS, "ns", "neighbour")
    await rig.caught_up()
    assert rig.world.holders("gpu-1", GPU) == ()
