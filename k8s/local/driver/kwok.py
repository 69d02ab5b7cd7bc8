"""KWOK beside the real kubelet: fake nodes with fake GPUs, for benches of hundreds of models.

The fake nodes carry a taint, so that only pods that tolerate it land there; the real node is left alone.
"""

from __future__ import annotations

import json
import time
from typing import Any

import claim
import clusters
import golang
from config import GPU_LABELS
from console import step
from kubectl import GPU, Kubectl, is_ready
from shell import DriverError

ANNOTATION = "kwok.x-k8s.io/node"
TAINT = {"key": ANNOTATION, "value": "fake", "effect": "NoSchedule"}
MAX_NODES = 1000


def up(nodes: int, gpus: int) -> None:
    """Starts the KWOK controller and makes `nodes` nodes of `gpus` GPUs each; a second call may change
    both.
    """
    if not clusters.on_this_machine():
        raise DriverError("kwok runs beside the local cluster only (CLUSTER=local)")
    if not 0 < nodes <= MAX_NODES:
        raise DriverError(f"--nodes {nodes} is not from 1 to {MAX_NODES}")
    golang.ensure((golang.KWOK,))
    client = clusters.kubectl()
    with step("KWOK"):
        claim.supervisor().ensure("kwok", command(client))
        wanted = [fake_node(number, gpus) for number in range(nodes)]
        remove(client, keep={node["metadata"]["name"] for node in wanted})
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted})
        client("apply", "--server-side", "--force-conflicts", "-f", "-", text=text)
    with step(f"{nodes} fake nodes of {gpus} {GPU} are Ready"):
        wait(client, nodes)


def down() -> None:
    with step("remove KWOK's nodes"):
        remove(clusters.kubectl(), keep=set())
        claim.supervisor().stop("kwok")


def command(client: Kubectl) -> list[str]:
    program = golang.KWOK.path()
    return [
        str(program),
        f"--kubeconfig={client.kubeconfig}",
        f"--config={program.parent / 'stages.yaml'}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-annotation-selector={ANNOTATION}=fake",
        "--cidr=10.245.0.0/16",
        "--node-lease-duration-seconds=40",
    ]


def fake_node(number: int, gpus: int) -> dict[str, Any]:
    name = f"kwok-{number:03d}"
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", GPU: str(gpus)}
    labels = {"type": "kwok", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **GPU_LABELS}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": {ANNOTATION: "fake"}, "labels": labels},
        "spec": {"taints": [TAINT]},
        "status": {"allocatable": resources, "capacity": resources},
    }


def fake_nodes(client: Kubectl) -> list[Any]:
    found: list[Any] = client.get("nodes", "-l", "type=kwok")["items"]
    return found


def remove(client: Kubectl, keep: set[str]) -> None:
    names = [node["metadata"]["name"] for node in fake_nodes(client) if node["metadata"]["name"] not in keep]
    if names:
        client("delete", "node", "--wait=false", *names)


def wait(client: Kubectl, count: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while sum(is_ready(node) for node in fake_nodes(client)) < count:
        if time.monotonic() > deadline:
            raise DriverError(
                f"not {count} nodes Ready in {seconds:.0f} s; see {claim.supervisor().log('kwok')}"
            )
        time.sleep(0.5)
