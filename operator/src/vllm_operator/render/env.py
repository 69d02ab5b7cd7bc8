"""The environment of an engine. https://docs.vllm.ai/en/stable/configuration/env_vars.html"""

from __future__ import annotations

from vllm_operator.api.source import SecretKey
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest
from vllm_operator.render.storage import HOME

# vLLM closes idle connections after 5 s by default; the gateway's pool must be the one that closes first.
KEEP_ALIVE_SECONDS = 75


def engine_env(spec: Spec) -> list[Manifest]:
    """The operator's variables, then the spec's, which win over those that are not managed."""
    made: dict[str, Manifest] = {
        name: {"name": name, "value": value} for name, value in _literals(spec).items()
    }
    hub = spec.source.hugging_face
    if hub is not None and hub.token_secret is not None:
        made["HF_TOKEN"] = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": _secret_key(hub.token_secret)}}
    for item in spec.engine.env:
        made[item.name] = item.model_dump(by_alias=True, exclude_none=True)
    return list(made.values())


def _literals(spec: Spec) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1"} if spec.source.hugging_face is None else {}
    hidden = {"NVIDIA_VISIBLE_DEVICES": "void"} if spec.gpu_count == 0 else {}
    return {
        "HOME": HOME,
        "VLLM_ENGINE_READY_TIMEOUT_S": str(spec.start_seconds),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **offline,
        **hidden,
    }


def _secret_key(reference: SecretKey) -> Manifest:
    return {"name": reference.name, "key": reference.key}
