"""Every name that the operator, the cluster and the gateway agree on. No logic beyond joining strings."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

GROUP = "vllm-fleet.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "VLLMModel"
PLURAL = "vllmmodels"

FIELD_MANAGER = "vllm-operator"
LEASE_NAME = "vllm-operator"

LABEL_MODEL = f"{GROUP}/model"
LABEL_MODEL_UID = f"{GROUP}/model-uid"
LABEL_COMPONENT = "app.kubernetes.io/component"
ANNOTATION_HASH = f"{GROUP}/manifest-hash"
ANNOTATION_TEMPLATE_HASH = f"{GROUP}/template-hash"
ANNOTATION_ROLLOUT = f"{GROUP}/rollout"  # why Auto did not surge
ANNOTATION_LAST_GOOD = f"{GROUP}/last-good"  # the pod template to return to, as JSON
ANNOTATION_ROLLED_BACK = f"{GROUP}/rolled-back"  # the template that failed, and why, as JSON
ANNOTATION_UPGRADE = f"{GROUP}/upgrade"  # the template that replaced another without an edit of the model
ANNOTATION_SECRETS = f"{GROUP}/secrets"  # versions of the Secrets: when first seen, and now
ANNOTATION_SECRET_VERSIONS = f"{GROUP}/secret-versions"  # of the pods: those that have changed since
ANNOTATION_PAUSED = f"{GROUP}/paused"

ENGINE = "engine"  # the container, the component, and the suffix of the children's names
WORKER = "engine-worker"  # the component of the pods that a leader spreads its engine over
PREFETCH = "prefetch"  # the component of the Job that downloads weights, and of its pod
ENGINE_KEY_FIELD = "api-key"
ENGINE_PORT = 8000
ENGINE_PORT_NAME = "http"

# A child's name is the model's plus at most 18 characters, and a label value has 63.
MAX_NAME_LENGTH = 45
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"


class ModelKey(NamedTuple):
    """What the queue is keyed by. No uid: a model made anew under the name has children of the same names."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def engine_name(model: str) -> str:
    """The Deployment's and the Service's name. Never `vllm`: its service variables would break vLLM."""
    return f"{model}-{ENGINE}"


def group_name(model: str) -> str:
    """The LeaderWorkerSet's name. Not engine_name: its controller makes a headless Service of that name."""
    return f"{model}-nodes"


def cache_name(model: str) -> str:
    """The claim's name."""
    return f"{model}-cache"


def prefetch_name(model: str, key: str) -> str:
    """The Job's name; `key` has eight characters and stands for what is downloaded."""
    return f"{model}-prefetch-{key}"


def engine_key_secret(model: str, engine_key: str) -> str:
    """Another key is another Secret, so that one never needs to be changed, nor read."""
    return f"{engine_name(model)}-{hashlib.sha256(engine_key.encode()).hexdigest()[:8]}"


def selector_labels(model: str) -> dict[str, str]:
    """A Deployment's selector can never change, so it holds only what never will."""
    return {LABEL_MODEL: model, LABEL_COMPONENT: ENGINE}


def labels(model: str, uid: str, component: str = ENGINE) -> dict[str, str]:
    return {
        **selector_labels(model),
        LABEL_COMPONENT: component,
        LABEL_MODEL_UID: uid,
        "app.kubernetes.io/name": "vllm-engine",
        "app.kubernetes.io/instance": model,
        "app.kubernetes.io/managed-by": "vllm-operator",
        "app.kubernetes.io/part-of": "vllm-fleet",
    }
