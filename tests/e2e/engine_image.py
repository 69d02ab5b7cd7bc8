"""A script that runs once in the engine's real image, in a pod of its own: what vLLM itself says."""

from __future__ import annotations

import json
from typing import Any

import cluster

IMAGE = "vllm-fleet/vllm-cpu:0.32.0"
ANSWER = "ANSWER "


def answer(name: str, script: str, env: dict[str, str], folder: str = "/scratch") -> Any:
    """The JSON that the script prints after the word ANSWER. `folder` is empty and can be written to."""
    cluster.apply(_pod(name, script, env, folder))
    try:
        cluster.eventually(lambda: _phase(name) in ("Succeeded", "Failed"), f"{name} has ended", 600)
        log = cluster.kubectl("logs", name)
        assert _phase(name) == "Succeeded", log
    finally:
        cluster.delete("pod", name)
    return json.loads(next(line for line in log.splitlines() if line.startswith(ANSWER))[len(ANSWER) :])


def _pod(name: str, script: str, env: dict[str, str], folder: str) -> cluster.Manifest:
    container = {
        "name": "script",
        "image": IMAGE,
        "command": ["python3", "-c", script],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "volumeMounts": [{"name": "scratch", "mountPath": folder}],
    }
    spec = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 1,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def _phase(name: str) -> str:
    return str((cluster.get("pod", name) or {}).get("status", {}).get("phase", ""))
