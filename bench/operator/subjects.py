"""What is measured: how an operator is started, what its models look like, and when one of them is ready."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from access import installed, prerequisites
from flows import Client
from observer import IsReady, model_serves
from programs import Program, free_port

from vllm_operator.kinds import MODELS, Body, Kind

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "bench-models"
KWOK = {"key": "kwok.x-k8s.io/node", "operator": "Exists", "effect": "NoSchedule"}
LOOPBACK = "127.0.0.1"

Start = Callable[[Path, Path], Program]  # of a kubeconfig and a folder for logs


@dataclass(frozen=True)
class Subject:
    """An operator. `edited` is a model with a change that replaces its pods."""

    title: str
    client: Client
    kind: Kind
    model: Callable[[str], Body]
    edited: Callable[[Body], Body]
    child_of: Callable[[str], str]
    is_ready: IsReady
    prerequisites: tuple[Body, ...]
    start: Start


def vllm_fleet(workers: int, replicas: int) -> Subject:
    return Subject(
        title="vllm-operator",
        client=Client("vllm-operator", "vllm-fleet", "vllm-fleet-operator", "vllm-fleet.dev", MODELS.plural),
        kind=MODELS,
        model=lambda name: _vllm_model(name, replicas),
        edited=lambda body: _with_engine(body, {"maxModelLen": 4096}),
        child_of=lambda name: f"{name}-engine",
        is_ready=model_serves,
        prerequisites=tuple(prerequisites(ROOT / "k8s" / "install.yaml", "operator")),
        start=lambda kubeconfig, folder: _start_ours(kubeconfig, folder, workers),
    )


def _vllm_model(name: str, replicas: int) -> Body:
    spec: Body = {"model": "org/small", "gpu": {"count": 1}, "scheduling": {"tolerations": [KWOK]}}
    spec["replicas"] = replicas
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": MODELS.api_version, "kind": MODELS.kind, "metadata": metadata, "spec": spec}


def _with_engine(body: Body, engine: Body) -> Body:
    return {**body, "spec": {**body["spec"], "engine": engine}}


def _start_ours(kubeconfig: Path, folder: Path, workers: int) -> Program:
    port = free_port()
    config = {"managementPort": port, "managementHost": LOOPBACK, "maxConcurrentReconciles": workers}
    path = folder / "operator.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("vllm-operator")), "run", "--config", str(path)]
    environment = {"KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": "vllm-fleet"}
    return Program(command, environment, folder / "operator.log", f"http://{LOOPBACK}:{port}/readyz")


def production_stack(folder: Path) -> Subject:
    """vllm-project/production-stack's operator, as the script of that name leaves it."""
    group, namespace = "production-stack.vllm.ai", "system"
    kind = Kind(f"{group}/v1alpha1", "VLLMRuntime", "vllmruntimes")
    runtime_class = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},  # the default of its deploymentConfig.runtimeClass
        "handler": "nvidia",
    }
    return Subject(
        title="production-stack",
        client=Client("production-stack", namespace, "controller-manager", group, kind.plural),
        kind=kind,
        model=_runtime,
        edited=_runtime_edited,
        child_of=lambda name: name,
        is_ready=lambda body: (body.get("status") or {}).get("modelStatus") == "Ready",
        prerequisites=(runtime_class, *installed(folder / "config", namespace)),
        start=lambda kubeconfig, logs: _start_production_stack(folder, kubeconfig, logs),
    )


def _runtime(name: str) -> Body:
    deployment = {
        "resources": {"gpu": "1"},
        "image": {"registry": "docker.io", "name": "vllm/vllm-openai:v0.32.0"},
        "toleration": [KWOK],
    }
    return {
        "apiVersion": "production-stack.vllm.ai/v1alpha1",
        "kind": "VLLMRuntime",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"modelURL": "org/small"},
            "vllmConfig": {"port": 8000, "v1": True},
            "deploymentConfig": deployment,
        },
    }


def _runtime_edited(body: Body) -> Body:
    """Another image: an edit of maxModelLen or extraArgs does not reach the Deployment of this operator."""
    changed = json.loads(json.dumps(body))
    changed["spec"]["deploymentConfig"]["image"]["name"] = "vllm/vllm-openai:v0.32.1"
    return dict(changed)


def _start_production_stack(folder: Path, kubeconfig: Path, logs: Path) -> Program:
    probe = f"{LOOPBACK}:{free_port()}"
    command = [str(folder / "manager"), f"--health-probe-bind-address={probe}"]
    return Program(
        command, {"KUBECONFIG": str(kubeconfig)}, logs / "production-stack.log", f"http://{probe}/readyz"
    )
