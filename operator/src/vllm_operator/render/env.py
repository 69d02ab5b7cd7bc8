"""The environment of an engine. https://docs.vllm.ai/en/stable/configuration/env_vars.html"""

from __future__ import annotations

from vllm_operator import names
from vllm_operator.api.source import S3Source, SecretKey
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest
from vllm_operator.render.storage import HOME

# vLLM closes idle connections after 5 s by default; the gateway's pool must be the one that closes first.
KEEP_ALIVE_SECONDS = 75


def engine_env(spec: Spec, key_secret: str = "") -> list[Manifest]:
    """The operator's variables, then the spec's, which win over those that are not managed."""
    made: dict[str, Manifest] = {
        name: {"name": name, "value": value} for name, value in _literals(spec).items()
    }
    if key_secret:
        reference = {"name": key_secret, "key": names.ENGINE_KEY_FIELD}
        made["VLLM_API_KEY"] = {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": reference}}
    hub = spec.source.hugging_face
    if hub is not None and hub.token_secret is not None:
        made["HF_TOKEN"] = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": _secret_key(hub.token_secret)}}
    made |= _bucket_env(spec.source.s3)
    for item in spec.engine.env:
        made[item.name] = item.model_dump(by_alias=True, exclude_none=True)
    return list(made.values())


def _literals(spec: Spec) -> dict[str, str]:
    offline = {} if spec.downloads else {"HF_HUB_OFFLINE": "1"}
    hidden = {"NVIDIA_VISIBLE_DEVICES": "void"} if spec.gpu_count == 0 and not spec.resource_claims else {}
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


def _bucket_env(source: S3Source | None) -> dict[str, Manifest]:
    """https://docs.vllm.ai/en/stable/models/extensions/runai_model_streamer/"""
    if source is None:
        return {}
    elsewhere = {
        "AWS_ENDPOINT_URL": source.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }
    literals = {**(elsewhere if source.endpoint else {}), "AWS_REGION": source.region}
    made: dict[str, Manifest] = {
        key: {"name": key, "value": value} for key, value in literals.items() if value
    }
    if source.secret is not None:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            reference = {"secretKeyRef": {"name": source.secret.name, "key": key}}
            made[key] = {"name": key, "valueFrom": reference}
    return made


def _secret_key(reference: SecretKey) -> Manifest:
    return {"name": reference.name, "key": reference.key}
