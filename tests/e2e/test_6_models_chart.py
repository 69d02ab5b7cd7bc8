"""The chart vllm-models with a real helm and API server.

Proves: `helm install --wait` returns when the models are as asked, here without pods; an upgrade changes a
model and deletes one that was taken out; with `keep` it stays, also after uninstalling; what no schema can
check is refused by the API server in its own words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import pytest
import releases

NAMESPACE = "models-chart"
CHART = releases.CHART.with_name("vllm-models")
IDLE = cluster.example("smollm2.yaml")["spec"] | {"replicas": 0}


@pytest.fixture(scope="module", autouse=True)
def namespace(release: None) -> Iterator[None]:
    with cluster.lent_namespace(NAMESPACE, releases.RESTRICTED):
        yield


@pytest.fixture(autouse=True)
def empty(namespace: None) -> Iterator[None]:
    yield
    releases.uninstall("models", NAMESPACE)
    cluster.kubectl("-n", NAMESPACE, "delete", "vllm", "--all")


def install(values: dict[str, Any], folder: Path) -> None:
    file = folder / "values.json"
    file.write_text(json.dumps(values))
    releases.helm(
        *("upgrade", "--install", "models", str(CHART), "--namespace", NAMESPACE),
        *("--values", str(file), "--wait", "--timeout", "120s"),
    )


def names() -> set[str]:
    listed = json.loads(cluster.kubectl("-n", NAMESPACE, "get", "vllm", "-o", "json"))
    return {item["metadata"]["name"] for item in listed["items"]}


def test_models_come_change_and_go(tmp_path: Path) -> None:
    one, two = IDLE | {"servedNames": ["one"]}, IDLE | {"servedNames": ["two"]}
    install({"models": {"one": one, "two": two}}, tmp_path)
    assert cluster.condition("one", "Ready", NAMESPACE)["reason"] == "ScaledToZero"
    install({"models": {"one": one | {"servedNames": ["other"]}}}, tmp_path)
    assert names() == {"one"}
    model = cluster.get("vllm", "one", NAMESPACE)
    assert model
    assert model["spec"]["servedNames"] == ["other"]
    install({"models": {"one": one}, "keep": True}, tmp_path)
    install({"models": {}, "keep": True}, tmp_path)
    releases.uninstall("models", NAMESPACE)
    assert names() == {"one"}


def test_what_depends_on_several_fields_is_refused_by_the_api_server(tmp_path: Path) -> None:
    both = IDLE | {"autoscaling": {"maxReplicas": 2}}
    with pytest.raises(AssertionError, match="replicas"):
        install({"models": {"both": both}}, tmp_path)
    assert names() == set()
