"""CLUSTER=existing: the cluster that KUBECONFIG names. The driver uses it and changes nothing in it."""

from __future__ import annotations

import os
from pathlib import Path

import tools
from console import say, step
from kubectl import Kubectl
from paths import BIN
from shell import DriverError


def up(count: int) -> None:
    """`count` of GPUs is for the clusters that the driver makes; this one has what it has."""
    del count
    tools.ensure()
    with step("the cluster answers"):
        Kubectl(BIN / "kubectl", kubeconfig())("get", "--raw=/readyz")


def down() -> None:
    say("CLUSTER=existing: not this driver's cluster; nothing to remove.")


def status() -> None:
    say(Kubectl(BIN / "kubectl", kubeconfig())("get", "nodes", "-o", "wide").rstrip())


def kubeconfig() -> Path:
    named = os.environ.get("KUBECONFIG", "").split(":")[0]
    path = Path(named) if named else Path.home() / ".kube" / "config"
    if not path.is_file():
        raise DriverError(f"CLUSTER=existing, but there is no kubeconfig {path}. Set KUBECONFIG to one")
    return path.absolute()


def image_digest(reference: str) -> str | None:
    raise DriverError(f"CLUSTER=existing: the driver cannot see whether a node has {reference}")


def load(archive: Path) -> None:
    raise DriverError(
        f"CLUSTER=existing: {archive} cannot be loaded into a cluster that this driver has not made.\n"
        "Push the images to a registry that it reaches, and set the chart's image.registry"
    )
