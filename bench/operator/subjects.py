"""What is measured: how an operator is started, what its models look like, and when one of them is ready.

The peers' own settings are left as they come wherever that runs; each exception has its reason beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from access import installed, prerequisites
from flows import Client
from observer import IsReady, model_serves, replicas_ready
from programs import Program, free_port

from vllm_operator.kinds import DEPLOYMENTS, MODELS, PODS, SERVICES, Body, Kind

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "bench-models"
KWOK = {"key": "kwok.x-k8s.io/node", "operator": "Exists", "effect": "NoSchedule"}
LOOPBACK = "127.0.0.1"
KUBEAI_LEASE = "cc6bca10.substratus.ai"

Start = Callable[[Path, Path], Program]  # of a kubeconfig and a folder for logs


@dataclass(frozen=True)
class Subject:
    """An operator. `edited` is a model with a change that replaces its pods.

    `children` are the kinds of which it makes one for each model of one replica; the last one runs the model.
    """

    title: str
    client: Client
    kind: Kind
    model: Callable[[str], Body]
    edited: Callable[[Body], Body]
    children: tuple[Kind, ...]
    is_ready: IsReady
    prerequisites: tuple[Body, ...]
    start: Start

    @property
    def workload(self) -> Kind:
        return self.children[-1]


def vllm_fleet(workers: int, replicas: int) -> Subject:
    return Subject(
        title="vllm-operator",
        client=Client("vllm-operator", "vllm-fleet", "vllm-fleet-operator", "vllm-fleet.dev", MODELS.plural),
        kind=MODELS,
        model=lambda name: _vllm_model(name, replicas),
        edited=lambda body: _with_engine(body, {"maxModelLen": 4096}),
        children=(SERVICES, DEPLOYMENTS),
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
        children=(SERVICES, DEPLOYMENTS),
        is_ready=lambda body: (body.get("status") or {}).get("modelStatus") == "Ready",
        prerequisites=(runtime_class, *installed(sorted(folder.glob("config/*/*.yaml")), namespace)),
        start=lambda kubeconfig, logs: _start_production_stack(folder, kubeconfig, logs),
    )


def _runtime(name: str) -> Body:
    deployment = {
        "resources": {"gpu": "1"},
        "image": {"registry": "docker.io", "name": "vllm/vllm-openai:v0.32.0"},
        "toleration": [KWOK],
        # Without a node selector its comparison of affinities meets a nil pointer, and no status is written.
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "kubernetes.io/os", "operator": "Exists"}]}],
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


def kubeai(folder: Path) -> Subject:
    """KubeAI, as the script of that name leaves it. It serves its own namespace only, and makes bare Pods."""
    group = "kubeai.org"
    kind = Kind(f"{group}/v1", "Model", "models")
    manifests = folder / "install.yaml"
    return Subject(
        title="KubeAI",
        client=Client("kubeai", NAMESPACE, "kubeai", group, kind.plural),
        kind=kind,
        model=_kubeai_model,
        edited=lambda body: {**body, "spec": {**body["spec"], "args": ["--max-model-len=4096"]}},
        children=(PODS,),
        is_ready=replicas_ready,
        prerequisites=tuple(installed([manifests], NAMESPACE)),
        start=lambda kubeconfig, logs: _start_kubeai(folder, kubeconfig, logs),
    )


def _kubeai_model(name: str) -> Body:
    spec = {
        "url": "hf://org/small",
        "engine": "VLLM",
        "features": ["TextGeneration"],
        "resourceProfile": "bench:1",
        "minReplicas": 1,  # by default a model without requests has no pods
    }
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": metadata, "spec": spec}


def kubeai_settings(manifests: Path, health: str, metrics: str) -> Body:
    """Its chart's, with a profile for our nodes; without `fixedSelfMetricAddrs` it looks for its own pod,
    finds none, and its autoscaler does nothing.
    """
    [text] = [
        body["data"]["system.yaml"]
        for body in yaml.safe_load_all(manifests.read_text())
        if body and body["kind"] == "ConfigMap" and "system.yaml" in (body.get("data") or {})
    ]
    gpu = {"nvidia.com/gpu": "1"}
    profile = {"imageName": "nvidia-gpu", "limits": gpu, "requests": gpu, "tolerations": [KWOK]}
    own = {"healthAddress": health, "metricsAddr": metrics, "fixedSelfMetricAddrs": [metrics]}
    return {**yaml.safe_load(text), **own, "resourceProfiles": {"bench": profile}}


def _start_kubeai(folder: Path, kubeconfig: Path, logs: Path) -> Program:
    """Its `readyz` answers before it has its Lease, which an earlier process leaves to run out. Its proxy
    listens on port 8000, whatever the settings.
    """
    health, metrics = (f"{LOOPBACK}:{free_port()}" for _ in range(2))
    path = logs / "kubeai.json"
    path.write_text(json.dumps(kubeai_settings(folder / "install.yaml", health, metrics)))
    environment = {"KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": NAMESPACE, "CONFIG_PATH": str(path)}
    leads = f"successfully acquired lease {NAMESPACE}/{KUBEAI_LEASE}"
    return Program(
        [str(folder / "manager")], environment, logs / "kubeai.log", f"http://{health}/readyz", leads
    )
