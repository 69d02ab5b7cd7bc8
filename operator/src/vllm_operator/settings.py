"""The operator's one configuration file: YAML in camelCase, unknown keys refused.

A ConfigMap of the chart holds it (`operator.config`); every key has a default, so an empty file is valid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vllm_operator.api.placement import Profile
from vllm_operator.api.values import HostPath, Image, LabelValue, ProfileName, QualifiedName, Section
from vllm_operator.errors import SettingsError
from vllm_operator.names import LEASE_NAME

DEFAULT_PATH = Path("/etc/vllm-fleet/operator.yaml")
# What reading a file of YAML raises: PyYAML's own errors, and what it lets through, for a date that is none
# (2024-13-01), `!!int x` or a list that holds itself, say.
UNREADABLE = (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


class Images(Section):
    """The engine's image where a model names none."""

    cuda: Image = Field("vllm/vllm-openai:v0.32.0", description="For device cuda.")
    cpu: Image = Field("vllm-fleet/vllm-cpu:0.32.0", description="For device cpu.")


class LeaseSettings(Section):
    """Leader election. The defaults are those of Kubernetes' own controllers."""

    name: Annotated[str, Field(min_length=1, max_length=63)] = Field(
        LEASE_NAME,
        description="Name of the Lease, in the operator's own namespace. The chart has one for each release.",
    )
    duration_seconds: Annotated[int, Field(ge=2, le=600)] = Field(
        15, description="How long a leader that no longer renews is waited for."
    )
    renew_seconds: Annotated[int, Field(ge=1, le=600)] = Field(
        10,
        description="A leader that could not renew for so long stops its work, well before another begins.",
    )
    retry_seconds: Annotated[float, Field(gt=0, le=600)] = Field(
        2, description="Between two attempts to renew or to take over."
    )

    @model_validator(mode="after")
    def _ordered(self) -> LeaseSettings:
        if not self.duration_seconds > self.renew_seconds > self.retry_seconds:
            raise ValueError("durationSeconds > renewSeconds > retrySeconds must hold")
        return self


class GpuSettings(Section):
    """The extended resource of models that name none."""

    resource: QualifiedName = Field("nvidia.com/gpu", description="Where a model's gpu.resource is absent.")
    product_labels: Annotated[Mapping[QualifiedName, QualifiedName], Field(max_length=16)] = Field(
        {},
        description="Label of the nodes that gpu.product is compared with, by the resource's domain. Known "
        "without it: nvidia.com, amd.com, gpu.intel.com.",
    )
    watch_nodes: bool = Field(
        True,
        description="Count free GPUs from nodes and all pods, for rollouts and messages. Needs the right to "
        "list both; without it the operator works, and Auto rollouts are in place.",
    )


class Peer(Section):
    """Pods that may reach the engines: those with podLabels, in the namespaces with namespaceLabels."""

    namespace_labels: Annotated[Mapping[QualifiedName, LabelValue], Field(max_length=16)] = Field(
        {}, description="Labels of the namespaces. Empty: all."
    )
    pod_labels: Annotated[Mapping[QualifiedName, LabelValue], Field(max_length=16)] = Field(
        {}, description="Labels of the pods. Empty: all."
    )


class NetworkPolicySettings(Section):
    """One NetworkPolicy per model: an engine's key does not close /health, /metrics and /tokenize."""

    allow_from: Annotated[tuple[Peer, ...], Field(max_length=16)] = Field(
        (),
        description="Who may open connections to port 8000 of the engines: name the gateway and Prometheus. "
        "Empty: no NetworkPolicy is made, since the operator cannot know where your Prometheus is.",
    )


class Policy(Section):
    """What a VLLMModel may ask for, judged on the pod as it would be applied.

    Who may create a VLLMModel must not own the node by it.
    """

    image_prefixes: Annotated[tuple[Image, ...], Field(max_length=64)] = Field(
        (),
        description="Prefixes of the images that models may name, compared as text up to a /, : or @. "
        "Empty: any. The defaults in images need none.",
    )
    host_path_prefixes: Annotated[tuple[HostPath, ...], Field(max_length=64)] = Field(
        (), description="Folders of the nodes that may be mounted, always read-only. Empty: none."
    )
    trust_remote_code: bool = Field(True, description="Whether models may set engine.trustRemoteCode.")
    engine_options: Literal["safe", "full"] = Field(
        "safe",
        description="What engine.extraArgs and engine.env may do. safe: nothing that loads code, lets "
        "callers read files of the pod or opens routes that change the engine; docs/policy.md has the list. "
        "full: anything but what a field manages.",
    )
    pod_template: Literal["none", "safe", "full"] = Field(
        "safe",
        description="What spec.podTemplate may do. none: nothing. safe: nothing that reaches the node or the "
        "API (host namespaces, hostPath, privilege, added capabilities, service accounts, nodeName), nor "
        "the engine's image and flags. full: all but the operator's own labels and ports, and the folders "
        "of hostPathPrefixes.",
    )


class EngineKeySettings(Section):
    """Keys between gateway and engines. With them, who can reach an engine's port can still not use it."""

    secret: Annotated[str, Field(max_length=63)] = Field(
        "",
        description="Secret with the master key, in the operator's own namespace; the operator makes it if "
        "it is absent. Each engine asks for a key derived from it. Empty: engines ask for none.",
    )


class Settings(Section):
    """Everything that a platform decides for all models."""

    images: Images = Field(Images(), description="Default images.")
    gpu: GpuSettings = Field(GpuSettings(), description="GPUs.")
    profiles: Annotated[Mapping[ProfileName, Profile], Field(max_length=64)] = Field(
        {},
        description="Sets of gpu, resources and scheduling defaults by the name that spec.profile gives. A "
        "change rolls out to the models that use it.",
    )
    policy: Policy = Field(Policy(), description="What models may ask for.")
    network_policy: NetworkPolicySettings = Field(
        NetworkPolicySettings(), description="Who may reach the engines."
    )
    engine_keys: EngineKeySettings = Field(EngineKeySettings(), description="Keys of the engines.")
    watch_namespaces: tuple[Annotated[str, Field(min_length=1, max_length=63)], ...] = Field(
        (), description="Namespaces whose models are served. Empty: all."
    )
    management_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9090, description="Port of /metrics, /livez and /readyz. 0 takes a free one."
    )
    management_host: str = Field("", description="Address to listen on. Empty: all.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="One JSON object a line, or text for people."
    )
    lease: LeaseSettings = Field(LeaseSettings(), description="Leader election.")
    max_concurrent_reconciles: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="Models worked on at once; one model never twice."
    )
    max_concurrent_rollouts: Annotated[int, Field(ge=1, le=1000)] = Field(
        1,
        description="Serving models whose pods are replaced at once without an edit of theirs: by a newer "
        "operator, other settings or a changed Secret. Others wait as UpgradePending.",
    )
    secret_access: bool = Field(
        False,
        description="Watch the Secrets' names and versions, never their content, so that a changed token "
        "rolls out. Needs the right to list and watch Secrets, which Kubernetes cannot narrow to that.",
    )
    resync_seconds: Annotated[int, Field(ge=10, le=86400)] = Field(
        300, description="Between two full lists of the models, which heal what a watch missed."
    )


def load_settings(path: Path | None) -> Settings:
    """The file's settings, or the defaults where it is absent and was not asked for. Raises SettingsError."""
    if path is None and not DEFAULT_PATH.exists():
        return Settings()
    path = path or DEFAULT_PATH
    try:
        raw = json_like(yaml.safe_load(path.read_text()))
    except UNREADABLE as error:
        raise SettingsError(f"{path}: {error}") from error
    return parse_settings(raw or {}, str(path))


def json_like(value: Any) -> Any:
    """YAML's dates as the text that a JSON document would have."""
    if isinstance(value, dict):
        return {str(key): json_like(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_like(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def parse_settings(raw: Any, where: str) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise SettingsError("\n".join(f"{where}: {_explain(detail)}" for detail in error.errors())) from error


def _explain(detail: ErrorDetails) -> str:
    key = ".".join(map(str, detail["loc"])) or "the file"
    return f"{key}: {'is no setting' if detail['type'] == 'extra_forbidden' else detail['msg']}"
