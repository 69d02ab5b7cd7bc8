"""`VLLMModel` of vllm-fleet.dev/v1alpha1: the spec's top, rules across sections, columns, subresources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from vllm_operator import names
from vllm_operator.api.adapters import Adapter
from vllm_operator.api.cache import Cache
from vllm_operator.api.engine import Engine
from vllm_operator.api.placement import Gpu, ResourceClaim, Resources, Scheduling
from vllm_operator.api.pod_template import PodTemplate
from vllm_operator.api.serving import Autoscaling, Gateway, Replicas, Rollout
from vllm_operator.api.source import MODELS_PATH, HuggingFaceSource, Source
from vllm_operator.api.status import Status
from vllm_operator.api.values import (
    DNS_LABEL,
    Duration,
    Image,
    ObjectName,
    ProfileName,
    Rule,
    Section,
    ServedName,
    duration_rule,
    seconds,
    text,
)

# What the gateway reads as a model by its full name, or as one of its adapters.
FULL_NAME_PATTERN = f"^{DNS_LABEL}/[a-z]([-a-z0-9]*[a-z0-9])?(:.*)?$"


def _unique(items: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(items)) != len(items):
        raise ValueError("must not name the same twice")
    return items


def _unique_adapters(items: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
    _unique(tuple(item.name for item in items))
    return items


class ImagePullSecret(Section):
    """A reference to a Secret with registry credentials."""

    name: ObjectName = Field(description="Name of the Secret, in the model's namespace.")


def _gpus_match(spec: Spec) -> bool:
    wanted = spec.gpu.count
    return wanted in (None, 0) or wanted * spec.nodes == spec.all_gpus


def _path_fits_source(spec: Spec) -> bool:
    if spec.source.local is not None:
        return spec.model.startswith("/")
    if spec.source.mounted is not None:
        return spec.source.folder is not None or spec.model.startswith(f"{MODELS_PATH}/")
    return not spec.model.startswith("/")


_PARALLEL = "self.?engine.?tensorParallelSize.orValue(1) * self.?engine.?pipelineParallelSize.orValue(1)"
_LOCAL = "!has(self.source) || !has(self.source.local) || self.model.startsWith('/')"
_VOLUME = (
    "!has(self.source) || !has(self.source.volume) || has(self.source.volume.path)"
    f" || self.model.startsWith('{MODELS_PATH}/')"
)
_HOST_PATH = f"!has(self.source) || !has(self.source.hostPath) || self.model.startsWith('{MODELS_PATH}/')"
_IMAGE = (
    "!has(self.source) || !has(self.source.image) || has(self.source.image.path)"
    f" || self.model.startsWith('{MODELS_PATH}/')"
)
_HUB = (
    "(has(self.source) && !has(self.source.huggingFace) && !has(self.source.s3))"
    " || !self.model.startsWith('/')"
)


_DOWNLOADS = (
    "!has(self.cache) || !has(self.source) || has(self.source.huggingFace)"
    " || (has(self.adapters) && self.adapters.exists(item, has(item.source.huggingFace)))"
)
_SHARED = (
    "!has(self.cache) || (has(self.cache.accessModes)"
    " && self.cache.accessModes.exists(mode, mode == 'ReadWriteMany'))"
)


class Spec(Section):
    """What a person asks for."""

    model: Annotated[str, text(512, r"^[A-Za-z0-9/._~][A-Za-z0-9/._~@:+=-]*$")] = Field(
        description="Hugging Face id such as meta-llama/Llama-3.1-8B-Instruct, or a path "
        "where the weights are in a folder."
    )
    served_names: Annotated[tuple[ServedName, ...], AfterValidator(_unique)] = Field(
        (),
        max_length=16,
        description="Short names by which callers ask for the model; <namespace>/<name> always works. "
        "Default: metadata.name.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    source: Source = Field(
        Source(hugging_face=HuggingFaceSource()),
        description="Where the weights come from. Default: huggingFace.",
    )
    profile: ProfileName | None = Field(
        None,
        description="Name of a set of gpu, resources and scheduling defaults in the operator's settings.",
    )
    image: Image | None = Field(
        None,
        description="Image of the engine. Default: the operator's settings, and kept when those change.",
    )
    image_pull_secrets: tuple[ImagePullSecret, ...] = Field(
        (), max_length=16, description="Credentials to pull the image."
    )
    engine: Engine = Field(Engine(), description="vLLM's own settings.")
    gpu: Gpu = Field(Gpu(), description="The GPUs of each pod.")
    nodes: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Nodes that one replica is spread over, each with gpu.count GPUs. Several need the "
        "LeaderWorkerSet API in the cluster: https://lws.sigs.k8s.io.",
    )
    resources: Resources = Field(Resources(), description="CPU and memory of the engine's container.")
    resource_claims: tuple[ResourceClaim, ...] = Field(
        (),
        max_length=16,
        description="Devices by dynamic resource allocation, instead of gpu.count or beside it.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    replicas: Replicas | None = Field(
        None,
        description="Pods that serve the model; `kubectl scale` sets it. Default: 1. Not with autoscaling. A "
        "HorizontalPodAutoscaler of the model needs it to be set, and changes it then.",
    )
    autoscaling: Autoscaling | None = Field(None, description="Replicas by load. Not with replicas.")
    adapters: Annotated[tuple[Adapter, ...], AfterValidator(_unique_adapters)] = Field(
        (),
        max_length=32,
        description="LoRA adapters that each pod serves beside the model, each by its own name.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    cache: Cache | None = Field(
        None, description="Keep what is downloaded on a volume, so that new pods start without a download."
    )
    start_timeout: Duration | None = Field(
        None,
        description="How long a pod may take from its start to serving, download included. Default: 30m.",
    )
    rollout: Rollout = Field(Rollout(), description="How a change is brought out.")
    gateway: Gateway = Field(Gateway(), description="How the gateway treats requests for the model.")
    scheduling: Scheduling = Field(Scheduling(), description="Which nodes the pods may run on.")
    pod_template: PodTemplate | None = Field(
        None, description="What no other field says about the pods; applied last, judged by settings.policy."
    )

    rules = (
        Rule(
            "!has(self.gpu) || !has(self.gpu.count) || self.gpu.count == 0"
            f" || self.gpu.count * self.?nodes.orValue(1) == {_PARALLEL}",
            "must be engine.tensorParallelSize times engine.pipelineParallelSize (or 0 for none), divided by "
            "nodes: set engine.tensorParallelSize to the number of GPUs, or leave gpu.count out",
            _gpus_match,
            ".gpu.count",
        ),
        Rule(
            f"!has(self.nodes) || ({_PARALLEL}) % self.nodes == 0",
            "must divide engine.tensorParallelSize times engine.pipelineParallelSize: each node has an equal "
            "share of the GPUs",
            lambda spec: spec.all_gpus % spec.nodes == 0,
            ".nodes",
        ),
        Rule(
            "!(has(self.replicas) && has(self.autoscaling))",
            "set either replicas or autoscaling",
            lambda spec: spec.replicas is None or spec.autoscaling is None,
            ".replicas",
        ),
        Rule(
            _LOCAL,
            "must be an absolute path in the image, because source is local",
            lambda spec: spec.source.local is None or _path_fits_source(spec),
            ".model",
        ),
        Rule(
            _VOLUME,
            f"must be a path under {MODELS_PATH}, or set source.volume.path",
            lambda spec: spec.source.volume is None or _path_fits_source(spec),
            ".model",
        ),
        Rule(
            _IMAGE,
            f"must be a path under {MODELS_PATH}, or set source.image.path",
            lambda spec: spec.source.image is None or _path_fits_source(spec),
            ".model",
        ),
        Rule(
            _HOST_PATH,
            f"must be a path under {MODELS_PATH}, where source.hostPath is mounted",
            lambda spec: spec.source.host_path is None or _path_fits_source(spec),
            ".model",
        ),
        Rule(
            _HUB,
            "is a path, but source is huggingFace or s3: set source.local or source.volume, or give an id",
            lambda spec: (spec.source.hugging_face or spec.source.s3) is None or _path_fits_source(spec),
            ".model",
        ),
        Rule(
            f"!has(self.servedNames) || self.servedNames.all(name, !name.matches('{FULL_NAME_PATTERN}'))",
            "must not look like <namespace>/<name>, which could be another model's",
            lambda spec: not any(re.search(FULL_NAME_PATTERN, name) for name in spec.served_names),
            ".servedNames",
        ),
        Rule(
            f"!has(self.adapters) || self.adapters.all(item, !item.name.matches('{FULL_NAME_PATTERN}'))",
            "names must not look like <namespace>/<name>, which could be another model's",
            lambda spec: not any(re.search(FULL_NAME_PATTERN, item.name) for item in spec.adapters),
            ".adapters",
        ),
        Rule(
            "!has(self.adapters) || !has(self.servedNames)"
            " || self.adapters.all(item, !(item.name in self.servedNames))",
            "must have names of their own, not one of servedNames",
            lambda spec: not {item.name for item in spec.adapters} & set(spec.served_names),
            ".adapters",
        ),
        Rule(
            "!has(self.engine) || !(has(self.engine.maxLoras) || has(self.engine.maxLoraRank))"
            " || (has(self.adapters) && self.adapters.size() > 0)",
            "maxLoras and maxLoraRank are for adapters: name some in spec.adapters",
            lambda spec: spec.adapters or (spec.engine.max_loras or spec.engine.max_lora_rank) is None,
            ".engine",
        ),
        Rule(
            _DOWNLOADS,
            "keeps what is downloaded from the Hugging Face Hub, and nothing is: leave it out",
            lambda spec: spec.cache is None or spec.downloads,
            ".cache",
        ),
        Rule(
            f"{_SHARED} || ((!has(self.replicas) || self.replicas <= 1)"
            " && (!has(self.autoscaling) || self.autoscaling.maxReplicas <= 1)"
            " && (!has(self.nodes) || self.nodes == 1))",
            "a ReadWriteOnce claim is mounted by one node at a time: set accessModes to [ReadWriteMany], or "
            "have at most one replica on one node",
            lambda spec: spec.mounts_anywhere or spec.most_replicas * spec.nodes <= 1,
            ".cache",
        ),
        Rule(
            f"{_SHARED} || !has(self.rollout) || !has(self.rollout.strategy)"
            " || self.rollout.strategy != 'Surge'",
            "Surge starts a second pod, and a ReadWriteOnce cache is mounted by one node at a time: set "
            "cache.accessModes to [ReadWriteMany], or strategy to Auto",
            lambda spec: spec.mounts_anywhere or spec.rollout.strategy != "Surge",
            ".rollout.strategy",
        ),
        duration_rule("startTimeout", "10s", "24h"),
    )

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        if self.engine.device == "auto":
            return "cpu" if self.gpu.count == 0 and not self.resource_claims else "cuda"
        return self.engine.device

    @property
    def downloads(self) -> bool:
        """Whether the engine gets anything from the Hugging Face Hub."""
        hub = (self.source.hugging_face, *(item.source.hugging_face for item in self.adapters))
        return any(source is not None for source in hub)

    @property
    def prefetches(self) -> bool:
        return self.cache is not None and self.cache.prefetch

    @property
    def mounts_anywhere(self) -> bool:
        """Whether nothing binds the pods to the node where another one runs."""
        return self.cache is None or self.cache.is_shared

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling is not None else self.wanted_replicas

    @property
    def gpu_count(self) -> int:
        """Devices per pod, those of resourceClaims not counted."""
        if self.gpu.count is not None:
            return self.gpu.count
        if self.device == "cpu" or self.resource_claims:
            return 0
        return self.all_gpus // self.nodes

    @property
    def all_gpus(self) -> int:
        """Of one replica, as its parallelism asks for them."""
        return self.engine.tensor_parallel_size * self.engine.pipeline_parallel_size

    @property
    def wanted_replicas(self) -> int:
        if self.autoscaling is not None:
            return max(1, self.autoscaling.min_replicas)
        return 1 if self.replicas is None else self.replicas

    @property
    def start_seconds(self) -> int:
        return int(seconds(self.start_timeout or "30m"))

    @property
    def drain_seconds(self) -> int:
        return int(seconds(self.rollout.drain_timeout or "10m"))


class Metadata(Section):
    """The parts of ObjectMeta that matter here."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(max_length=253)]
    namespace: str = "default"
    uid: str = "00000000-0000-0000-0000-000000000000"  # of a manifest that was never applied
    generation: int = 0
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    annotations: Mapping[str, str] = {}

    @property
    def key(self) -> names.ModelKey:
        return names.ModelKey(self.namespace, self.name)


class VLLMModel(Section):
    """A large language model served by vLLM on this cluster."""

    metadata: Metadata
    spec: Spec = Field(description="What is asked for.")
    status: Status = Field(Status(), description="What is, as the operator sees it.")

    rules = (
        Rule(
            f"self.metadata.name.size() <= {names.MAX_NAME_LENGTH}",
            f"metadata.name must have at most {names.MAX_NAME_LENGTH} characters: names are made from it",
            lambda model: len(model.metadata.name) <= names.MAX_NAME_LENGTH,
        ),
        Rule(
            f"self.metadata.name.matches('{names.NAME_PATTERN}')",
            "metadata.name must begin with a letter and hold only lower-case letters, digits and '-': "
            "a Service is named after it",
            lambda model: re.search(names.NAME_PATTERN, model.metadata.name) is not None,
        ),
        Rule(
            "!has(self.spec.adapters) || self.spec.adapters.all(item, item.name != self.metadata.name)",
            "must have names of their own: metadata.name is the model's",
            lambda model: model.metadata.name not in model.adapter_names,
            ".spec.adapters",
        ),
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        """The short names asked for."""
        return self.spec.served_names or (self.metadata.name,)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The short names asked for its adapters."""
        return tuple(item.name for item in self.spec.adapters)

    @property
    def paused(self) -> bool:
        return self.metadata.annotations.get(names.ANNOTATION_PAUSED, "false") != "false"


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; priority 1 is shown with `-o wide`."""

    name: str
    type: Literal["string", "integer", "date"]
    path: str
    priority: int = 0


COLUMNS = (
    Column("Model", "string", ".spec.model"),
    Column("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
    Column("Replicas", "integer", ".status.replicas"),
    Column("GPUs", "integer", ".status.gpus"),
    Column("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
    Column("Age", "date", ".metadata.creationTimestamp"),
    Column("Ready replicas", "integer", ".status.readyReplicas", 1),
    Column("Endpoint", "string", ".status.endpoint", 1),
    Column("Message", "string", '.status.conditions[?(@.type=="Ready")].message', 1),
)
SCALE = {
    "specReplicasPath": ".spec.replicas",
    "statusReplicasPath": ".status.replicas",
    "labelSelectorPath": ".status.selector",
}
