"""The pod of a model: one container, `engine`, its probes, and how it ends without cutting a stream."""

from __future__ import annotations

import math

from vllm_operator import names
from vllm_operator.api.v1alpha1 import Spec, VLLMModel
from vllm_operator.render.args import engine_args
from vllm_operator.render.env import engine_env
from vllm_operator.render.facts import Manifest
from vllm_operator.render.scheduling import container_resources, pod_placement
from vllm_operator.render.storage import volumes_and_mounts
from vllm_operator.settings import Settings

# Until every gateway has seen that the endpoint is terminating, requests still come: vLLM must go on so long.
PRE_STOP_SECONDS = 10
# A measured drain ran 8 s past its last token.
DRAIN_SLACK_SECONDS = 30
NON_ROOT = 65532
STARTUP_PERIOD_SECONDS = 2


def pod_template(model: VLLMModel, settings: Settings, image: str, key_secret: str = "") -> Manifest:
    """`key_secret` names the Secret with the engine's key; empty where it asks for none."""
    return {
        "metadata": {"labels": names.labels(model.metadata.name, model.metadata.uid)},
        "spec": _pod_spec(model, settings, image, key_secret),
    }


def termination_grace_seconds(spec: Spec) -> int:
    """Strictly more than preStop and drain together, or the kubelet would cut the last streams."""
    return PRE_STOP_SECONDS + spec.drain_seconds + DRAIN_SLACK_SECONDS


def _pod_spec(model: VLLMModel, settings: Settings, image: str, key_secret: str) -> Manifest:
    spec = model.spec
    volumes, mounts = volumes_and_mounts(spec, model.metadata.name)
    secrets = [{"name": secret.name} for secret in spec.image_pull_secrets]
    return {
        "containers": [_engine(model, settings, image, key_secret) | {"volumeMounts": mounts}],
        "volumes": volumes,
        "securityContext": _pod_security(spec),
        "terminationGracePeriodSeconds": termination_grace_seconds(spec),
        "automountServiceAccountToken": False,
        # Before its model is loaded vLLM handles no SIGTERM, and process 1 does not die of one by default: a
        # pod that is deleted while it loads would hold its GPU for the whole grace period.
        "shareProcessNamespace": True,
        "enableServiceLinks": False,  # VLLM_… variables of a Service would be read by vLLM
        **({"imagePullSecrets": secrets} if secrets else {}),
        **pod_placement(spec, settings),
    }


def _engine(model: VLLMModel, settings: Settings, image: str, key_secret: str) -> Manifest:
    spec = model.spec
    resources = container_resources(spec, settings)
    return {
        "name": names.ENGINE,
        "image": image,
        "command": ["vllm", "serve"],
        "args": engine_args(model, image),
        "env": engine_env(spec, key_secret),
        "ports": [{"name": names.ENGINE_PORT_NAME, "containerPort": names.ENGINE_PORT, "protocol": "TCP"}],
        **({"resources": resources} if resources else {}),
        **_probes(spec),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "securityContext": _container_security(spec),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the status quotes its last line
    }


def _probes(spec: Spec) -> Manifest:
    """The startup probe is the start budget: vLLM does not listen before its weights are loaded."""
    get = {"path": "/health", "port": names.ENGINE_PORT_NAME}
    health: Manifest = {"httpGet": get, "timeoutSeconds": 5}
    tries = math.ceil(spec.start_seconds / STARTUP_PERIOD_SECONDS)
    return {
        "startupProbe": {**health, "periodSeconds": STARTUP_PERIOD_SECONDS, "failureThreshold": tries},
        "readinessProbe": {**health, "periodSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": 10},
    }


def _container_security(spec: Spec) -> Manifest:
    """What drivers put into a GPU container when it starts needs a writable root file system."""
    common = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return common | ({} if spec.device == "cuda" else {"readOnlyRootFilesystem": True})


def _pod_security(spec: Spec) -> Manifest:
    """The image vllm/vllm-openai runs as root; our CPU image does not need to."""
    common: Manifest = {"seccompProfile": {"type": "RuntimeDefault"}}
    if spec.device == "cuda":  # the cache's files also belong to the prefetch Job, which is not root
        return common | ({"fsGroup": NON_ROOT} if spec.cache is not None else {})
    user = {"runAsNonRoot": True, "runAsUser": NON_ROOT, "runAsGroup": NON_ROOT, "fsGroup": NON_ROOT}
    return {**common, **user}
