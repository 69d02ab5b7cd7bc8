"""kubectl with a kubeconfig, and the few things that the driver does with a node."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import GPU_LABELS
from shell import DriverError, output, succeeds

GPU = "nvidia.com/gpu"
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Kubectl:
    program: Path
    kubeconfig: Path

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        return output([*self._command(), *arguments], text=text)

    def succeeds(self, *arguments: str) -> bool:
        return succeeds([*self._command(), *arguments])

    def get(self, *arguments: str) -> Any:
        return json.loads(self("get", *arguments, "-o", "json"))

    def _command(self) -> list[str]:
        return [str(self.program), f"--kubeconfig={self.kubeconfig}"]


def is_ready(node: Any, since: float = 0) -> bool:
    """Whether the node's kubelet has called it ready, at `since` (seconds since 1970) or later."""
    earliest = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since))
    return any(
        condition["type"] == "Ready"
        and condition["status"] == "True"
        and condition["lastHeartbeatTime"] >= earliest
        for condition in node["status"].get("conditions", [])
    )


def real_nodes(kubectl: Kubectl) -> list[Any]:
    """The nodes that can run a container: not KWOK's, and not a control plane that takes no pods."""
    nodes = kubectl.get("nodes", "-l", "type!=kwok")["items"]
    return [x for x in nodes if not any(t["effect"] == "NoSchedule" for t in x["spec"].get("taints", []))]


def wait_ready(kubectl: Kubectl, since: float = 0, seconds: float = READY_SECONDS) -> list[str]:
    """Waits for a node that is ready (see `is_ready`) and takes pods; returns the names of such nodes."""
    deadline = time.monotonic() + seconds
    while True:
        names = [node["metadata"]["name"] for node in real_nodes(kubectl) if is_ready(node, since)]
        if names:
            return names
        if time.monotonic() > deadline:
            raise DriverError(f"no node became Ready in {seconds:.0f} s. See: kubectl describe nodes")
        time.sleep(0.3)


def gpu_patch(count: int) -> str:
    """A JSON patch of a node's status (RFC 6902; `~1` is its word for a slash in a key)."""
    name = GPU.replace("/", "~1")
    paths = [f"/status/{part}/{name}" for part in ("capacity", "allocatable")]
    return json.dumps([{"op": "add", "path": path, "value": str(count)} for path in paths])


def set_gpus(kubectl: Kubectl, node: str, count: int) -> None:
    """Advertises GPUs that are not there: scheduler and quota believe in them, and no container sees a
    device.
    """
    kubectl("label", "--overwrite", "node", node, *(f"{key}={value}" for key, value in GPU_LABELS.items()))
    kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={gpu_patch(count)}")


def gpus(node: Any) -> int:
    """How many GPUs a node offers to pods."""
    return int(node["status"].get("allocatable", {}).get(GPU, "0"))
