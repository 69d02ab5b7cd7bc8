"""The chart as Helm renders it, for all chart tests; each distinct set of values is rendered once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import helm

Render = Callable[..., list[helm.Manifest]]
MONITORING = helm.Release(api_versions=("monitoring.coreos.com/v1",))


@pytest.fixture(scope="session")
def chart() -> helm.Helm:
    return helm.find_helm()


@pytest.fixture(scope="session")
def render(chart: helm.Helm) -> Render:
    """`render(values, release)`: the manifests; a fresh copy each time, so that a test may change it."""
    seen: dict[str, str] = {}

    def rendered(
        values: helm.Values | None = None, release: helm.Release = MONITORING
    ) -> list[helm.Manifest]:
        key = json.dumps([values, repr(release)])
        if key not in seen:
            seen[key] = chart.template(values or {}, release)
        return helm.manifests(seen[key])

    return rendered


@pytest.fixture(scope="session")
def find(render: Render) -> Callable[..., Any]:
    """`find(kind, name, values)`: the one manifest of that kind and name."""

    def one(kind: str, name: str, values: helm.Values | None = None) -> helm.Manifest:
        (found,) = [m for m in render(values) if (m["kind"], m["metadata"]["name"]) == (kind, name)]
        return found

    return one


@pytest.fixture(scope="session")
def pods(render: Render) -> Callable[..., Iterator[tuple[str, helm.Manifest]]]:
    """`pods(values)`: name and pod template of every workload."""

    def templates(values: helm.Values | None = None) -> Iterator[tuple[str, helm.Manifest]]:
        for manifest in render(values):
            if "template" in manifest.get("spec", {}):
                yield manifest["metadata"]["name"], manifest["spec"]["template"]

    return templates
