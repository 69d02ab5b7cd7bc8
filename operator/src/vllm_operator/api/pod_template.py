"""The last word about the pods: `spec.podTemplate`, a strategic merge over what was rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from vllm_operator.api.values import FreeForm, LabelValue, QualifiedName, Section


class PodTemplateMetadata(Section):
    """What pods may have besides the operator's own labels."""

    labels: Annotated[Mapping[QualifiedName, LabelValue], Field(max_length=32)] = Field(
        {}, description="Labels of the pods. Those of the operator cannot be changed."
    )
    annotations: Annotated[
        Mapping[QualifiedName, Annotated[str, Field(max_length=4096)]], Field(max_length=32)
    ] = Field({}, description="Annotations of the pods.")


class PodTemplate(Section):
    """Merged over the rendered pod as `kubectl patch` merges, then judged by the operator's settings.policy.

    Lists whose items have a key (containers, volumes, env, volumeMounts, ports) merge by it, other lists are
    replaced; `$patch: delete` takes an item away and `$patch: replace` puts a whole in its place.
    """

    metadata: PodTemplateMetadata = Field(PodTemplateMetadata(), description="Labels and annotations.")
    spec: FreeForm = Field({}, description="A pod's spec; the engine's container is called engine.")
