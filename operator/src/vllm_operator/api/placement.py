"""Where a model runs and what it takes: `spec.gpu`, `spec.resources`, `spec.scheduling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from vllm_operator.api.values import (
    DNS_LABEL,
    FreeForm,
    LabelValue,
    ObjectName,
    QualifiedName,
    Quantity,
    Rule,
    Section,
    text,
)


class Gpu(Section):
    """The extended resource that each pod asks for."""

    resource: QualifiedName | None = Field(
        None,
        description="Name of the resource, for example nvidia.com/mig-1g.5gb or amd.com/gpu. "
        "Default: the operator's settings, nvidia.com/gpu.",
    )
    count: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="Devices per pod; 0 hides every GPU from it. Default: tensorParallelSize times "
        "pipelineParallelSize divided by nodes, and 0 for device cpu.",
    )
    product: LabelValue | None = Field(
        None,
        description="Only on nodes whose product label has this value: nvidia.com/gpu.product, "
        "amd.com/gpu.product-name, gpu.intel.com/product, by the resource's vendor.",
    )
    memory: Quantity | None = Field(
        None,
        description="What the model needs of each GPU, weights and cache, for example 70Gi. Compared with "
        "the nodes' label nvidia.com/gpu.memory for a warning in the status; the scheduler is not told.",
    )


ResourceList = Annotated[Mapping[QualifiedName, Quantity], Field(max_length=16)]


class Resources(Section):
    """CPU and memory of the engine's container; GPUs stand in spec.gpu."""

    requests: ResourceList = Field({}, description="What the scheduler reserves, for example cpu and memory.")
    limits: ResourceList = Field({}, description="What the container may use at most.")
    shared_memory: Quantity | None = Field(
        None,
        description="Most that /dev/shm may hold; it counts as the container's memory. Default: no limit of "
        "its own.",
    )

    rules = (
        Rule(
            "!has(self.requests) || !self.requests.exists(name, name.endsWith('/gpu'))",
            "GPUs are asked for in spec.gpu",
            lambda resources: not any(name.endswith("/gpu") for name in resources.requests),
            ".requests",
        ),
        Rule(
            "!has(self.limits) || !self.limits.exists(name, name.endsWith('/gpu'))",
            "GPUs are asked for in spec.gpu",
            lambda resources: not any(name.endswith("/gpu") for name in resources.limits),
            ".limits",
        ),
    )


class ResourceClaim(Section):
    """A claim of the pods: https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/."""

    name: Annotated[str, text(63, rf"^{DNS_LABEL}$")] = Field(description="Name inside the pod.")
    resource_claim_name: ObjectName | None = Field(
        None, description="A ResourceClaim that exists, shared by all pods of the model."
    )
    resource_claim_template_name: ObjectName | None = Field(
        None, description="A ResourceClaimTemplate, from which each pod gets its own."
    )

    rules = (
        Rule(
            "has(self.resourceClaimName) != has(self.resourceClaimTemplateName)",
            "set either resourceClaimName or resourceClaimTemplateName",
            lambda claim: (claim.resource_claim_name is None) != (claim.resource_claim_template_name is None),
        ),
    )


class Toleration(Section):
    """As in a pod."""

    key: QualifiedName | None = Field(None, description="Key of the taint; empty tolerates every key.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="Exists ignores the value.")
    value: LabelValue | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; empty tolerates every effect."
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="How long a NoExecute taint is tolerated."
    )

    rules = (
        Rule(
            "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            "without a key, operator must be Exists",
            lambda item: item.key is not None or item.operator == "Exists",
        ),
        Rule(
            "!has(self.value) || !has(self.operator) || self.operator != 'Exists'",
            "operator Exists has no value",
            lambda item: item.value is None or item.operator != "Exists",
            ".value",
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "only effect NoExecute has tolerationSeconds",
            lambda item: item.toleration_seconds is None or item.effect == "NoExecute",
            ".tolerationSeconds",
        ),
    )


class Scheduling(Section):
    """Handed to the pods as it is."""

    node_selector: Annotated[Mapping[QualifiedName, LabelValue], Field(max_length=32)] = Field(
        {}, description="Labels that a node must have."
    )
    tolerations: tuple[Toleration, ...] = Field(
        (), max_length=32, description="Taints that the pods tolerate."
    )
    affinity: FreeForm | None = Field(None, description="A pod's affinity.")
    topology_spread_constraints: tuple[FreeForm, ...] = Field(
        (), max_length=8, description="A pod's topologySpreadConstraints."
    )
    priority_class_name: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    runtime_class_name: ObjectName | None = Field(
        None, description="RuntimeClass of the pods, for example nvidia."
    )
    scheduler_name: ObjectName | None = Field(None, description="Scheduler of the pods.")


class Profile(Section):
    """Defaults that a platform gives a name, for models that say spec.profile. What a model sets itself wins.

    nodeSelector, requests and limits are joined key by key; any other field is taken whole.
    """

    gpu: Gpu = Field(Gpu(), description="Defaults of spec.gpu.")
    resources: Resources = Field(Resources(), description="Defaults of spec.resources.")
    scheduling: Scheduling = Field(Scheduling(), description="Defaults of spec.scheduling.")
