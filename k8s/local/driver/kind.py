"""kind: Kubernetes in Docker, where a Docker engine answers.

Not run by this project's own CI, whose machines have no Docker engine; kept as small as it can be for that
reason.
"""

from __future__ import annotations

from pathlib import Path

import containerd
import golang
import tools
from console import say, step
from kubectl import Kubectl, gpus, real_nodes, set_gpus, wait_ready
from paths import BIN, KUBECONFIG, LOCAL, LOGS, STATE
from shell import output, run

NAME = "vllm-fleet"
LOG = LOGS / "kind.log"
CONFIG = LOCAL / "kind.yaml"


def up(count: int) -> None:
    tools.ensure()
    golang.ensure((golang.KIND,))
    if NAME not in output([golang.KIND.path(), "get", "clusters"]).split():
        with step("create the kind cluster") as work:
            work.follow(LOG)
            command: list[str | Path] = [
                "create",
                "cluster",
                "--name",
                NAME,
                "--config",
                CONFIG,
                "--kubeconfig",
                KUBECONFIG,
            ]
            run([golang.KIND.path(), *command], LOG)
    else:
        run([golang.KIND.path(), "export", "kubeconfig", "--name", NAME, "--kubeconfig", KUBECONFIG], LOG)
    with step("node is Ready") as work:
        for node in wait_ready(client()):
            set_gpus(client(), node, count)
        work.note = f"{count} nvidia.com/gpu (pretended)"


def down() -> None:
    with step("delete the kind cluster"):
        golang.ensure((golang.KIND,))
        run([golang.KIND.path(), "delete", "cluster", "--name", NAME], LOG)
    for path in (KUBECONFIG, STATE / "choice"):
        path.unlink(missing_ok=True)


def status() -> None:
    say(client()("get", "nodes", "-o", "wide").rstrip())
    for node in real_nodes(client()):
        say(f"  {node['metadata']['name']}: {gpus(node)} nvidia.com/gpu")


def client() -> Kubectl:
    return Kubectl(BIN / "kubectl", KUBECONFIG)


def kubeconfig() -> Path:
    return KUBECONFIG


def image_digest(reference: str) -> str | None:
    listing = output(
        ["docker", "exec", f"{NAME}-control-plane", "ctr", "--namespace=k8s.io", "images", "list"]
    )
    return containerd.image_digest(listing, reference)


def load(archive: Path) -> None:
    run([golang.KIND.path(), "load", "image-archive", archive, "--name", NAME], LOG)
