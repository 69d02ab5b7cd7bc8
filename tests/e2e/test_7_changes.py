"""What changes around a model, before a real API server, its controllers and its scheduler.

Proves, of the list of failures that the project is judged by:
E23  where nothing of the former revision is left to serve, an edit that fails gives way to what last served.
E24  where the operator may watch Secrets, a rotated token rolls out a model at a time; an autoscaler of the
     Deployment is told of, and does not get its way.
And: a model is scaled through its own scale subresource; a paused one is left alone.
"""

from __future__ import annotations

import json
from typing import Any

import cluster
import pytest
from operators import Operators, all_ready, engine_of, make_ready, model, pods

pytestmark = pytest.mark.e2e
ENGINE = "m-engine"


def replicas(namespace: str) -> int:
    found = cluster.get("deployment", ENGINE, namespace) or {}
    return int(found["spec"]["replicas"])


def engine_pod(namespace: str, other_than: str = "") -> str:
    """The model's one pod, once it is another than the one given."""
    return cluster.eventually(
        lambda: next((name for name in pods(namespace, 1) if name != other_than), ""), "a new pod", 60, 0.1
    )


def settled_pod(namespace: str, **spec: Any) -> str:
    """A model m whose one pod serves, as far as the API server knows."""
    cluster.apply(model("m", **spec), namespace)
    pod = engine_pod(namespace)
    make_ready([pod], namespace)
    cluster.eventually(lambda: all_ready(namespace, 1), "it is Ready", 60, 0.1)
    return pod


def new_pod(namespace: str, known: list[str]) -> str:
    """The one of two pods that is not known."""

    def others() -> list[str]:
        return [name for name in pods(namespace, 2) if name not in known]

    (found,) = cluster.eventually(others, "another pod", 60, 0.1)
    return found


def waiting(namespace: str) -> list[str]:
    told = {name: cluster.condition(name, "Reconciling", namespace) for name in ("a", "b")}
    return [name for name, found in told.items() if found.get("reason") == "UpgradePending"]


def test_a_rotated_token_rolls_out_a_model_at_a_time(operators: Operators, namespace: str) -> None:
    """E24"""
    operators.start(secretAccess=True)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hf"}}
    cluster.apply({**secret, "stringData": {"token": "hf_first"}}, namespace)
    hub = {"huggingFace": {"tokenSecret": {"name": "hf"}}}
    for name in ("a", "b"):
        cluster.apply(model(name, model="org/m", source=hub, rollout={"strategy": "InPlace"}), namespace)
    made = cluster.eventually(lambda: pods(namespace, 2), "two pods", 60)
    make_ready(made, namespace)
    cluster.eventually(lambda: all_ready(namespace, 2), "both are Ready", 60, 0.1)
    cluster.apply({**secret, "stringData": {"token": "hf_second"}}, namespace)
    (last,) = cluster.eventually(lambda: waiting(namespace), "one waits", 60, 0.1)
    first = new_pod(namespace, made)
    assert not first.startswith(f"{last}-engine")
    make_ready([first], namespace)
    assert new_pod(namespace, [*made, first]).startswith(f"{last}-engine")
    assert "hf_" not in json.dumps(cluster.get("deployment", f"{last}-engine", namespace))


def test_an_autoscaler_of_the_deployment_is_told_of(operators: Operators, namespace: str) -> None:
    """E24: two that set the same number would never end."""
    operators.start()
    settled_pod(namespace)
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": ENGINE}
    theirs = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "theirs"},
        "spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3},
    }
    with cluster.watching(f"/apis/apps/v1/namespaces/{namespace}/deployments") as seen:
        cluster.apply(theirs, namespace)
        its = seen.first(lambda event: event.body["spec"]["replicas"] == 2, "the autoscaler has set it")
        seen.first(lambda event: event.at > its.at and event.body["spec"]["replicas"] == 1, "it is set back")
    cluster.eventually(
        lambda: cluster.condition("m", "Accepted", namespace)["reason"] == "ForeignAutoscaler",
        "it is told",
        60,
    )
    words = cluster.condition("m", "Accepted", namespace)["message"]
    assert "let its scaleTargetRef name VLLMModel m" in words


def test_what_fails_gives_way_to_what_last_served(operators: Operators, namespace: str) -> None:
    """E23: its engine has ended twice, and of the former pods none is left."""
    operators.start()
    unseen = {"schedulerName": "nobody"}  # else its pod is "unschedulable" first of all
    before = settled_pod(namespace, rollout={"strategy": "Recreate"}, scheduling=unseen)
    good = engine_of("m", namespace)["args"]
    cluster.patch_spec("m", {"engine": {"maxModelLen": 100_000}}, namespace)
    failing = engine_pod(namespace, before)
    assert engine_of("m", namespace)["args"] != good
    end_twice(failing, "ValueError: the context is too long", namespace)
    cluster.eventually(lambda: engine_of("m", namespace)["args"] == good, "the former arguments", 60, 0.1)
    make_ready([engine_pod(namespace, failing)], namespace)
    cluster.eventually(
        lambda: (
            reasons(namespace) == {"Accepted": "Accepted", "Ready": "RolledBack", "Stalled": "RolledBack"}
        ),
        lambda: f"it is told; {cluster.conditions('m', namespace)}",
        60,
        0.1,
    )
    told = cluster.condition("m", "Stalled", namespace)["message"]
    assert "generation 2 failed (CrashLooping: the engine ended with exit code 1: Value" in told


def reasons(namespace: str) -> dict[str, str]:
    return {kind: found["reason"] for kind, found in cluster.conditions("m", namespace).items()}


def end_twice(pod: str, words: str, namespace: str) -> None:
    """Plays the kubelet of a pod whose engine ends, and ends again."""
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": words}}
    container = {
        "name": "engine",
        "image": "i",
        "imageID": "i",
        "ready": False,
        "restartCount": 2,
        "lastState": ended,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    }
    status = {"status": {"phase": "Running", "containerStatuses": [container]}}
    patch = ("--subresource=status", "--type=merge", "-p", json.dumps(status))
    cluster.kubectl("-n", namespace, "patch", "pod", pod, *patch)


def test_a_model_is_scaled_as_a_deployment_is(operators: Operators, namespace: str) -> None:
    operators.start()
    settled_pod(namespace)
    cluster.kubectl("-n", namespace, "scale", "vllm/m", "--replicas=2")
    cluster.eventually(lambda: pods(namespace, 2), "two pods", 60, 0.1)
    path = f"/apis/vllm-fleet.dev/v1alpha1/namespaces/{namespace}/vllmmodels/m/scale"
    scale = cluster.eventually(lambda: scale_of(path, 2), "both are counted", 60, 0.1)
    selected = cluster.items("pods", scale["status"]["selector"], namespace)
    assert sorted(pod["metadata"]["name"] for pod in selected) == sorted(pods(namespace, 2))


def scale_of(path: str, replicas: int) -> cluster.Manifest:
    """What an autoscaler reads, once it tells of so many replicas."""
    found = json.loads(cluster.kubectl("get", "--raw", path))
    return found if found["status"]["replicas"] == replicas else {}


def test_a_paused_model_is_left_alone(operators: Operators, namespace: str) -> None:
    operator = operators.start()
    settled_pod(namespace)
    annotate = ("-n", namespace, "annotate", "vllm", "m")
    cluster.kubectl(*annotate, "vllm-fleet.dev/paused=true")
    cluster.eventually(
        lambda: cluster.condition("m", "Accepted", namespace)["reason"] == "Paused", "it says so", 60, 0.1
    )
    cluster.kubectl("-n", namespace, "scale", f"deployment/{ENGINE}", "--replicas=0")
    cluster.eventually(lambda: not cluster.engine_pods("m", namespace), "its pod is gone", 60)
    cluster.eventually(
        lambda: (cluster.get("vllm", "m", namespace) or {})["status"]["replicas"] == 0,
        "the operator has seen it",
        60,
    )
    assert replicas(namespace) == 0
    assert [write for write in operator.proxy.writes() if "deployments" in write.path][1:] == []
    cluster.kubectl(*annotate, "vllm-fleet.dev/paused-")
    cluster.eventually(lambda: pods(namespace, 1), "it is repaired", 60, 0.1)
