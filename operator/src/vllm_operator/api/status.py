"""What the operator says about a model: conditions after kstatus, with a closed list of reasons.

Reconciling and Stalled are absent when false and never both true; observedGeneration is in the first write.
https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from vllm_operator.api.values import Section

MAX_MESSAGE = 1024


class Reason(StrEnum):
    """Every reason a condition can have. docs/troubleshooting.md has one entry for each."""

    SERVING = "Serving"
    SCALED_TO_ZERO = "ScaledToZero"
    ROLLING_OUT = "RollingOut"
    ROLLED_BACK = "RolledBack"
    UPGRADE_PENDING = "UpgradePending"
    ACCEPTED = "Accepted"
    PAUSED = "Paused"
    FOREIGN_AUTOSCALER = "ForeignAutoscaler"
    STARTING = "Starting"
    PULLING = "Pulling"
    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    DRAINING = "Draining"
    UNSCHEDULABLE = "Unschedulable"
    INSUFFICIENT_GPU = "InsufficientGPU"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CRASH_LOOPING = "CrashLooping"
    OUT_OF_MEMORY = "OutOfMemory"
    ENGINE_ERROR = "EngineError"
    WRONG_FLAG = "WrongFlag"
    MODEL_ACCESS_DENIED = "ModelAccessDenied"
    DOWNLOAD_FAILED = "DownloadFailed"
    INVALID_SPEC = "InvalidSpec"
    NAME_CONFLICT = "NameConflict"
    CHILD_CONFLICT = "ChildConflict"
    FORMER_OBJECT = "FormerObject"
    MISSING_SECRET = "MissingSecret"  # noqa: S105
    MISSING_CONFIG_MAP = "MissingConfigMap"
    MISSING_VOLUME = "MissingVolume"
    MISSING_API = "MissingAPI"
    QUOTA_EXCEEDED = "QuotaExceeded"
    API_ERROR = "APIError"


DESCRIPTIONS: dict[Reason, str] = {
    Reason.SERVING: "Every wanted replica is ready.",
    Reason.SCALED_TO_ZERO: "No replica is wanted, and none runs.",
    Reason.ROLLING_OUT: "The previous revision serves while the new one starts.",
    Reason.ROLLED_BACK: "The newest spec did not come up, so the one that last served is back. Edit the spec "
    "to try again; see rollout.rollback.",
    Reason.UPGRADE_PENDING: "The operator would replace the pods without an edit of yours, and waits for its "
    "turn: settings.maxConcurrentRollouts.",
    Reason.ACCEPTED: "The spec is valid and its objects are in the cluster.",
    Reason.PAUSED: "The annotation vllm-fleet.dev/paused stops reconciliation. Remove it to go on.",
    Reason.FOREIGN_AUTOSCALER: "A HorizontalPodAutoscaler targets the Deployment, whose replicas are the "
    "operator's. Let it target the VLLMModel.",
    Reason.STARTING: "The pods are being made.",
    Reason.PULLING: "The node pulls the image or mounts the volumes.",
    Reason.DOWNLOADING: "The prefetch Job downloads the weights; the message says how much, since when.",
    Reason.LOADING: "The engine loads the weights; the message says since when.",
    Reason.DRAINING: "The last streams end in pods that are to go.",
    Reason.UNSCHEDULABLE: "No node fits; the message is the scheduler's own.",
    Reason.INSUFFICIENT_GPU: "No node has the GPUs free; the scheduler's words, and the node with most.",
    Reason.IMAGE_PULL_FAILED: "The node cannot pull the image. Check its name, and imagePullSecrets.",
    Reason.CRASH_LOOPING: "The engine ends again and again; the message holds its last line.",
    Reason.OUT_OF_MEMORY: "The kernel killed the engine, or CUDA had no memory left. Raise "
    "resources.limits.memory, or lower engine.maxModelLen or engine.gpuMemoryUtilization.",
    Reason.ENGINE_ERROR: "The engine ended with an error; the message holds its last line.",
    Reason.WRONG_FLAG: "vLLM refuses its command line: mend engine.extraArgs, or the flag's field.",
    Reason.MODEL_ACCESS_DENIED: "Hugging Face does not give the model out: check spec.model, the token in "
    "source.huggingFace.tokenSecret, and that its account has accepted the model's terms.",
    Reason.DOWNLOAD_FAILED: "The prefetch Job cannot get the weights; the message says why: the revision, "
    "or the room in the cache. It tries again by itself.",
    Reason.INVALID_SPEC: "A field is wrong; the message says how to mend it. What runs is left as it is.",
    Reason.NAME_CONFLICT: "An older model of another namespace holds a short name; <namespace>/<name> works.",
    Reason.CHILD_CONFLICT: "An object of the child's name exists that this model does not own.",
    Reason.FORMER_OBJECT: "An object of a deleted model of the same name is not gone yet, such as a "
    "claim that pods still mount. The model goes on when it is.",
    Reason.MISSING_SECRET: "A Secret that the pods refer to is not there, or lacks the key.",
    Reason.MISSING_CONFIG_MAP: "A ConfigMap that the pods refer to is not there, or lacks the key.",
    Reason.MISSING_VOLUME: "A PersistentVolumeClaim that the pods refer to is not there.",
    Reason.MISSING_API: "The cluster lacks an API that the model needs; the message says how to install it.",
    Reason.QUOTA_EXCEEDED: "A quota, a LimitRange or an admission policy refuses an object or its pods.",
    Reason.API_ERROR: "The API server refused or could not be reached; the operator tries again by itself.",
}

ConditionType = Literal["Accepted", "Ready", "Reconciling", "Stalled"]


class Condition(Section):
    """As metav1.Condition."""

    type: ConditionType = Field(description="Accepted, Ready, Reconciling or Stalled.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="One word of the documented list.")
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] = Field(
        "", description="For a person, with what to do."
    )
    last_transition_time: Annotated[str, Field(max_length=32)] = Field(
        description="When status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: Annotated[int, Field(ge=0)] = Field(0, description="Generation that was judged.")


class Served(Section):
    """What last served: at least one ready pod."""

    model_config = ConfigDict(extra="ignore")

    generation: Annotated[int, Field(ge=0)] = Field(0, description="Generation of the spec.")
    template: Annotated[str, Field(max_length=64)] = Field("", description="Hash of the pod template.")
    spec: Annotated[str, Field(max_length=64)] = Field(
        "",
        description="Hash of the spec without replicas, autoscaling and gateway: they change no pod.",
    )


class Status(Section):
    """Written by the operator alone, and only when something in it changes."""

    model_config = ConfigDict(extra="ignore")

    observed_generation: Annotated[int, Field(ge=-1)] = Field(
        0, description="Generation that was acted on; -1 before any was."
    )
    replicas: Annotated[int, Field(ge=0)] = Field(
        0, description="Pods of any revision, terminating ones left out."
    )
    ready_replicas: Annotated[int, Field(ge=0)] = Field(0, description="Pods that serve.")
    selector: Annotated[str, Field(max_length=512)] = Field(
        "", description="Selector of the pods, for autoscalers."
    )
    served_names: tuple[Annotated[str, Field(max_length=128)], ...] = Field(
        (), max_length=16, description="Short names granted to this model; the gateway routes no others."
    )
    adapters: tuple[Annotated[str, Field(max_length=128)], ...] = Field(
        (),
        max_length=32,
        description="Names granted to this model's adapters, routed like servedNames; each is also reachable "
        "as <namespace>/<model>:<adapter>.",
    )
    endpoint: Annotated[str, Field(max_length=253)] = Field(
        "", description="The engine's Service, inside the cluster."
    )
    image: Annotated[str, Field(max_length=512)] = Field("", description="Image of the engine.")
    image_default_for: Annotated[str, Field(max_length=16)] = Field(
        "", description="Device whose default image is pinned; empty where spec.image is set."
    )
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs of all wanted replicas.")
    last_served: Served = Field(
        Served(),
        description="What last served, to which a failed rollout without a serving revision returns.",
    )
    conditions: tuple[Condition, ...] = Field(
        (),
        max_length=8,
        description="Accepted, Ready, Reconciling, Stalled.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )

    @field_validator("observed_generation")
    @classmethod
    def _seen(cls, generation: int) -> int:
        """Before the first write it is the definition's default, or nothing: the same to us."""
        return max(generation, 0)

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((item for item in self.conditions if item.type == kind), None)
