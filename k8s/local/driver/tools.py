"""kubectl and helm in `.cluster/bin`, built from the same modules for every kind of cluster."""

from __future__ import annotations

from pathlib import Path

import golang
from golang import Program
from paths import BIN


def ensure() -> None:
    golang.ensure((golang.KUBERNETES, golang.HELM))
    link({"kubectl": golang.KUBERNETES, "helm": golang.HELM})


def link(programs: dict[str, Program]) -> None:
    """Names in `.cluster/bin` for programs in the cache; Kubernetes' program acts by the name it is called
    by.
    """
    BIN.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        replace(BIN / name, program.path())


def replace(path: Path, target: Path) -> None:
    fresh = path.with_name(f".{path.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.rename(path)
