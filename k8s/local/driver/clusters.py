"""Which cluster: the one that KUBECONFIG names, one in Docker, or one that runs on this machine itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import claim
import existing
import kind
import local
from console import say
from kubectl import Kubectl, real_nodes, set_gpus
from paths import BIN, STATE
from shell import DriverError, find, succeeds

CHOICE = STATE / "choice"
GPU_COUNT = STATE / "gpus"
NAMES = ("existing", "kind", "local")
REASONS = {
    "existing": "the one that KUBECONFIG names",
    "kind": "kind, in Docker",
    "local": "a Kubernetes of one node, built from Go modules",
}
MAX_GPUS = 64


class Provider(Protocol):
    """A way to have a cluster; modules implement it."""

    def up(self, count: int) -> None: ...
    def down(self) -> None: ...
    def status(self) -> None: ...
    def kubeconfig(self) -> Path: ...
    def load(self, archive: Path) -> None: ...
    def image_digest(self, reference: str) -> str | None: ...


def provider(name: str) -> Provider:
    providers: Mapping[str, Provider] = {"existing": existing, "kind": kind, "local": local}
    return providers[name]


def choose() -> str:
    """CLUSTER if set, else what the last `up` chose, else kind where a Docker engine answers, else local."""
    named = os.environ.get("CLUSTER", "")
    if named and named not in NAMES:
        raise DriverError(f"CLUSTER={named} is none of: {', '.join(NAMES)}")
    if named:
        return named
    if CHOICE.exists():
        return CHOICE.read_text().strip()
    if claim.owner() == STATE:  # of a first `up` that was killed half-way
        return "local"
    return "kind" if find("docker") and succeeds(["docker", "info"]) else "local"


def gpu_count() -> int:
    """GPUS if set, else what `gpus N` asked for last, else 2: one model, and room for its next revision."""
    text = os.environ.get("GPUS") or (GPU_COUNT.read_text() if GPU_COUNT.exists() else "2")
    return gpu_number(text, "GPUS=")


def gpu_number(text: str, source: str) -> int:
    if not text.isdecimal() or int(text) > MAX_GPUS:
        raise DriverError(f"{source}{text} is not a whole number from 0 to {MAX_GPUS}")
    return int(text)


def up(*, images: bool = False) -> None:
    """Makes the chosen cluster run; with `images`, builds what is missing or stale of the images and loads
    it.
    """
    name = choose()
    say(f"Cluster: {REASONS[name]}")
    provider(name).up(gpu_count())
    if name != "existing":  # which is nobody's to take down, and must not hide a cluster that is
        STATE.mkdir(exist_ok=True)
        CHOICE.write_text(name)
    if images:
        load_images(name)


def load_images(name: str) -> None:
    import images  # loads the builders, which no other command needs

    if name == "existing":
        images.explain_existing()
    else:
        restart(images.ensure_loaded(provider(name)))


def load_older(tree: Path, tag: str) -> None:
    """Builds the operator's and the gateway's image from another tree, and loads them under `tag`."""
    import images

    if not (tree / "Dockerfile.gateway").is_file():
        raise DriverError(f"{tree} is no tree of this repository: it has no Dockerfile.gateway")
    images.ensure_loaded(provider(choose()), images.older(tree.resolve(), tag))


def restart(components: list[str]) -> None:
    """Lets running pods of a component take its new image, whose name is the one they have already."""
    for component in components:
        ours = f"app.kubernetes.io/part-of=vllm-fleet,app.kubernetes.io/component={component}"
        for item in kubectl().get("deployments", "--all-namespaces", f"--selector={ours}")["items"]:
            name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
            kubectl()("rollout", "restart", f"deployment/{name}", f"--namespace={namespace}")


def down() -> None:
    provider(choose()).down()


def status() -> None:
    provider(choose()).status()


def load(archive: Path) -> None:
    if not archive.is_file():
        raise DriverError(f"no such file: {archive}")
    provider(choose()).load(archive)


def set_gpu_count(count: int) -> None:
    """Changes how many GPUs each node pretends to have; 0 to MAX_GPUS."""
    name = choose()
    if name == "existing":
        raise DriverError("CLUSTER=existing: this driver changes no node of a cluster that it has not made")
    client = kubectl()
    for node in real_nodes(client):
        set_gpus(client, node["metadata"]["name"], count)
    GPU_COUNT.write_text(str(count))


def stop_program(name: str) -> None:
    require_local("stop")
    local.stop_one(name)


def start_program(name: str) -> None:
    require_local("start")
    local.start_one(name)


def require_local(what: str) -> None:
    if not on_this_machine():
        raise DriverError(f"{what} is for the programs of the local cluster (CLUSTER=local)")


def on_this_machine() -> bool:
    """Whether pods and Services have addresses that this machine itself reaches."""
    return choose() == "local"


def tool(name: str) -> Path:
    """kubectl or helm, of the versions that this project is tested with."""
    return BIN / name


def kubeconfig() -> Path:
    return provider(choose()).kubeconfig()


def kubectl() -> Kubectl:
    return Kubectl(tool("kubectl"), kubeconfig())


def environment() -> dict[str, str]:
    """What a program needs to find the cluster and its tools."""
    return {"KUBECONFIG": str(kubeconfig()), "PATH": f"{BIN}:{os.environ['PATH']}"}
