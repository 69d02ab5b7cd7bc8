"""Helm releases as users make them, and what one leaves behind."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import cluster

CHART = cluster.ROOT / "charts" / "vllm-fleet"

# Where an upgrade starts while there is no release: the last commit before caches, several nodes, rollbacks,
# and the rights and fields that these need. The pods of an unchanged model are the same in both.
PREVIOUS = "983d6cc81cf6a7d27a9a2b32d6d7bd9e0ca569b8"
PREVIOUS_TAG = "previous"
HELM_WAIT = "5m"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def helm(*arguments: str) -> str:
    return cluster.run(cluster.tool("helm"), *arguments).stdout


def install(
    *flags: str, name: str = "vllm-fleet", namespace: str = cluster.SYSTEM_NAMESPACE, chart: Path = CHART
) -> None:
    """Installs or upgrades; a stopping gateway gives proxies 5 s, so that the tests wait less."""
    helm(
        *("upgrade", "--install", name, str(chart), "--namespace", namespace, "--create-namespace"),
        *("--wait", "--timeout", HELM_WAIT, "--set", "gateway.config.shutdownDelay=5s", *flags),
    )


def uninstall(name: str = "vllm-fleet", namespace: str = cluster.SYSTEM_NAMESPACE) -> None:
    helm("uninstall", name, "--namespace", namespace, "--wait", "--ignore-not-found")


def namespace(name: str) -> cluster.Manifest:
    """A namespace that enforces Pod Security `restricted`."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def component_pods(component: str, namespace: str = cluster.SYSTEM_NAMESPACE) -> list[cluster.Manifest]:
    """The pods of the operator or the gateway that are not being deleted."""
    return cluster.staying(cluster.items("pods", f"app.kubernetes.io/component={component}", namespace))


def operator_leads() -> bool:
    """Whether one of the operator's pods holds the Lease, and not one that was ended or killed."""
    lease = cluster.get("lease", "vllm-operator", cluster.SYSTEM_NAMESPACE) or {"spec": {}}
    holder, _, _ = (lease["spec"].get("holderIdentity") or "").rpartition("_")
    return holder in {pod["metadata"]["name"] for pod in component_pods("operator")}


def previous_tree(folder: Path) -> Path:
    """The repository as it was at PREVIOUS, written into the folder."""
    archive = folder / "previous.tar"
    done = cluster.run(
        *("git", "-C", str(cluster.ROOT), "archive", f"--output={archive}", PREVIOUS), check=False
    )
    assert done.returncode == 0, (
        f"{PREVIOUS}, where the upgrade starts, is not in this clone: git fetch --unshallow\n{done.stderr}"
    )
    with tarfile.open(archive) as content:
        content.extractall(folder / "previous", filter="data")
    return folder / "previous"


def install_previous(folder: Path) -> None:
    """A first install of the previous chart, with images made of the same commit."""
    tree = previous_tree(folder)
    driver = cluster.ROOT / "k8s" / "local" / "driver"
    cluster.run(sys.executable, str(driver), "older", str(tree), "--tag", PREVIOUS_TAG)
    tags = ("--set", f"operator.image.tag={PREVIOUS_TAG}", "--set", f"gateway.image.tag={PREVIOUS_TAG}")
    install(*tags, chart=tree / "charts" / CHART.name)


def left_of(release: str) -> set[str]:
    """Every object in the cluster, of whatever kind, that carries the release's label."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    selector = f"app.kubernetes.io/instance={release}"
    return set(cluster.kubectl("get", ",".join(kinds), "-A", "-l", selector, "-o", "name").split())
