"""Engines that do not come up, by real vLLM on the real kubelet, and what the model's status says of them.

Proves, of the list of failures that the project is judged by:
E23  an edit that vLLM refuses when it runs leaves the old revision serving; the status has vLLM's own words,
     and taking the edit back is enough.
E24  a Secret, a ConfigMap or a claim that is not there is told by its name, no container starts without it,
     and when it is there the pod goes on by itself.
E25  an image that does not exist and an engine killed for memory are told as what they are. (The shortage of
     GPUs: test_3_models.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cluster
import httpx
import pytest

pytestmark = pytest.mark.e2e
CPU_ONLY: dict[str, Any] = {"engine": {"device": "cpu"}, "gpu": {"count": 0}}


@pytest.fixture
def sick(release: None) -> Iterator[str]:
    yield "sick"
    cluster.remove_model("sick")


def not_ready(name: str, reason: str, seconds: float) -> cluster.Manifest:
    """The condition Ready once it has this reason."""
    return cluster.eventually(
        lambda: next(
            (c for c in (cluster.condition(name, "Ready"),) if c.get("reason") == reason),
            None,
        ),
        lambda: f"{name} is {reason}; {cluster.condition(name, 'Ready')}",
        seconds,
    )


def sick_model(**spec: Any) -> cluster.Manifest:
    manifest = cluster.example("smollm2.yaml")
    manifest["metadata"]["name"] = "sick"
    manifest["spec"] |= (
        {"servedNames": ["sick"], "resources": {"requests": {"cpu": "100m"}}} | CPU_ONLY | spec
    )
    return manifest


def answers(port: int, name: str) -> bool:
    body = {"message": "Say hello.", "model": name, "max_tokens": 4}
    return httpx.post(f"http://127.0.0.1:{port}/chat", json=body, timeout=60).is_success


def restarts(name: str) -> int:
    (pod,) = cluster.engine_pods(name)
    return sum(state["restartCount"] for state in pod["status"].get("containerStatuses", ()))


def test_what_is_missing_is_told_and_then_taken_up(sick: str) -> None:
    """E24: of a Secret, by the kubelet, which tries again by itself."""
    hub = {"huggingFace": {"tokenSecret": {"name": "sick"}}}
    cluster.apply(sick_model(model="vllm-fleet/no-such-model", source=hub))
    said = not_ready(sick, "MissingSecret", 120)
    assert 'secret "sick" not found' in said["message"]
    assert cluster.condition(sick, "Stalled")["reason"] == "MissingSecret"
    assert restarts(sick) == 0
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "sick"}}
    cluster.apply({**secret, "stringData": {"token": "hf_none"}})
    try:
        not_ready(sick, "Loading", 180)
    finally:
        cluster.delete("secret", "sick")


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        (
            {"source": {"volume": {"claimName": "absent", "path": "x"}}},
            "MissingVolume",
            'persistentvolumeclaim "absent" not found',
        ),
        (
            {"engine": {"device": "cpu", "chatTemplate": {"configMap": {"name": "absent", "key": "t"}}}},
            "MissingConfigMap",
            'configmap "absent" not found',
        ),
    ],
)
def test_which_object_is_missing_is_told(sick: str, spec: dict[str, Any], reason: str, words: str) -> None:
    """E24: of a claim by the scheduler, of a mounted ConfigMap by the kubelet's Event."""
    cluster.apply(sick_model(**spec))
    assert words in not_ready(sick, reason, 120)["message"]


def test_an_image_that_does_not_exist_is_told(sick: str) -> None:
    """E25"""
    cluster.apply(sick_model(image="127.0.0.1:9/absent:1.0"))
    said = not_ready(sick, "ImagePullFailed", 120)
    assert said["status"] == "False"
    assert "127.0.0.1:9/absent:1.0" in said["message"]
    print(said["message"])


def test_an_engine_killed_for_memory_is_told(sick: str) -> None:
    """E25: the kernel kills it while it imports torch."""
    memory = {"cpu": "100m", "memory": "400Mi"}
    cluster.apply(sick_model(resources={"requests": memory, "limits": {"memory": "400Mi"}}))
    said = not_ready(sick, "OutOfMemory", 300)
    assert said["status"] == "False"
    assert "resources.limits.memory" in said["message"]
    print(said["message"])


def test_an_edit_that_vllm_refuses_leaves_the_old_revision_serving(smollm2: str, gateway: int) -> None:
    """E23: the schema cannot know how long the model's context is; vLLM does."""
    before = [pod["metadata"]["uid"] for pod in cluster.engine_pods(smollm2)]
    cluster.patch_spec(smollm2, {"engine": {"maxModelLen": 100_000}})
    try:
        words = cluster.eventually(
            lambda: next((m for m in troubles(smollm2) if "max_model_len" in m), ""),
            lambda: f"vLLM's words; {troubles(smollm2)}",
            300,
        )
        print(words)
        assert "100000" in words
        assert cluster.condition(smollm2, "Ready")["status"] == "True"
        assert answers(gateway, smollm2)
    finally:
        cluster.patch_spec(smollm2, {"engine": {"maxModelLen": 2048}})
        cluster.wait_settled(smollm2)
    assert [pod["metadata"]["uid"] for pod in cluster.engine_pods(smollm2)] == before


def troubles(name: str) -> list[str]:
    return [cluster.condition(name, kind).get("message", "") for kind in ("Reconciling", "Stalled")]
