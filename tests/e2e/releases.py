"""Helm releases as users make them, and what one leaves behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cluster

CHART = cluster.ROOT / "charts" / "vllm-fleet"
HELM_WAIT = "5m"


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
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def older_chart(folder: Path, column: str) -> Path:
    """This chart with a lower version, and a definition that does not print `column` yet."""
    chart = folder / CHART.name
    shutil.copytree(CHART, chart)
    edit(chart / "Chart.yaml", r"(?m)^version: .*", "version: 0.0.9")
    edit(
        chart / "templates" / "crds" / "vllmmodels.yaml",
        rf"(?m)^( *)- name: {column}\n(\1  .*\n)+",
        "",
    )
    return chart


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1, f"{path}: {count} times {pattern}"
    path.write_text(text)


def left_of(release: str) -> set[str]:
    """Every object in the cluster, of whatever kind, that carries the release's label."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    selector = f"app.kubernetes.io/instance={release}"
    return set(cluster.kubectl("get", ",".join(kinds), "-A", "-l", selector, "-o", "name").split())
