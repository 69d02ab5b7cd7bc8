"""Where the weights come from: `spec.source`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vllm_operator.api.values import HostPath, ObjectName, Rule, Section, text

MODELS_PATH = "/models"  # where a volume with weights is mounted


class SecretKey(Section):
    """A key of a Secret in the model's namespace. The operator never reads it: the kubelet does."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: Annotated[str, text(253, r"^[-._a-zA-Z0-9]+$")] = Field("token", description="Key in the Secret.")


class HuggingFaceSource(Section):
    """Downloaded by the engine from the Hugging Face Hub."""

    revision: Annotated[str, text(128, r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = Field(
        None, description="Branch, tag or commit. Default: the repository's main branch."
    )
    token_secret: SecretKey | None = Field(
        None, description="Access token for gated or private models, as a reference to a Secret."
    )


class LocalSource(Section):
    """The weights are in the engine's image; `spec.model` is their path."""


class VolumeSource(Section):
    """The weights are on a PersistentVolumeClaim, mounted read-only at /models."""

    claim_name: ObjectName = Field(description="A PersistentVolumeClaim in the model's namespace.")
    path: Annotated[str, text(512, r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")] | None = Field(
        None,
        description="Folder of the model inside the claim. Without it, spec.model is a path under /models.",
    )

    rules = (
        Rule(
            "!has(self.path) || !self.path.contains('..')",
            "must not contain '..'",
            lambda volume: volume.path is None or ".." not in volume.path,
            ".path",
        ),
    )


class HostPathSource(Section):
    """The weights are in a folder of every node that the pods may run on, mounted read-only at /models."""

    path: HostPath = Field(
        description="Folder on the node, within the operator's settings.policy.hostPathPrefixes; "
        "spec.model is a path under /models."
    )

    rules = (
        Rule(
            "!self.path.contains('..')",
            "must not contain '..'",
            lambda host: ".." not in host.path,
            ".path",
        ),
    )


class Source(Section):
    """Exactly one of the sources."""

    hugging_face: HuggingFaceSource | None = Field(None, description="Download from the Hugging Face Hub.")
    local: LocalSource | None = Field(None, description="Weights in the engine's image.")
    volume: VolumeSource | None = Field(None, description="Weights on a PersistentVolumeClaim.")

    host_path: HostPathSource | None = Field(
        None, description="Weights in a folder of the nodes, only where the operator's settings allow it."
    )

    rules = (
        Rule(
            "[has(self.huggingFace), has(self.local), has(self.volume), has(self.hostPath)]"
            ".exists_one(set, set)",
            "set exactly one of huggingFace, local, volume and hostPath",
            lambda source: len(source.chosen) == 1,
        ),
    )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The sources that are set, by attribute."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)
