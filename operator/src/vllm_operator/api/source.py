"""Where the weights come from: `spec.source`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vllm_operator.api.values import HostPath, Image, ObjectName, Rule, Section, text

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


PATH_PATTERN = r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$"

INSIDE = Rule(
    "!has(self.path) || !self.path.contains('..')",
    "must not contain '..'",
    lambda source: source.path is None or ".." not in source.path,
    ".path",
)


class VolumeSource(Section):
    """The weights are on a PersistentVolumeClaim, mounted read-only at /models."""

    claim_name: ObjectName = Field(description="A PersistentVolumeClaim in the model's namespace.")
    path: Annotated[str, text(512, PATH_PATTERN)] | None = Field(
        None,
        description="Folder of the model inside the claim. Without it, spec.model is a path under /models.",
    )

    rules = (INSIDE,)


class ImageSource(Section):
    """The weights are an OCI image, mounted read-only at /models. Needs Kubernetes 1.36 or newer."""

    reference: Image = Field(description="Image of the weights, pulled with spec.imagePullSecrets.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Default: IfNotPresent, and Always for the tag latest."
    )
    path: Annotated[str, text(512, PATH_PATTERN)] | None = Field(
        None,
        description="Folder of the model inside the image. Without it, spec.model is a path under /models.",
    )

    rules = (INSIDE,)


class SecretRef(Section):
    """A Secret in the model's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")


class S3Source(Section):
    """Streamed by the engine from an S3 bucket (vLLM's load format runai_streamer)."""

    uri: Annotated[str, text(1024, r"^s3://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._=+-]+)+/?$")] = Field(
        description="Folder of the model, for example s3://weights/llama-8b."
    )
    secret: SecretRef | None = Field(
        None,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Without it, the "
        "node's own identity is used.",
    )
    endpoint: Annotated[str, text(253, r"^https?://[A-Za-z0-9][A-Za-z0-9.:-]*/?$")] | None = Field(
        None, description="URL of a store that is not AWS's, for example http://minio.minio:9000."
    )
    region: Annotated[str, text(63, r"^[a-z0-9-]+$")] | None = Field(
        None, description="Region of the bucket."
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

    image: ImageSource | None = Field(None, description="Weights in an OCI image.")
    s3: S3Source | None = Field(None, description="Weights in an S3 bucket.")
    host_path: HostPathSource | None = Field(
        None, description="Weights in a folder of the nodes, only where the operator's settings allow it."
    )

    rules = (
        Rule(
            "[has(self.huggingFace), has(self.local), has(self.volume), has(self.image),"
            " has(self.s3), has(self.hostPath)].exists_one(set, set)",
            "set exactly one of huggingFace, local, volume, image, s3 and hostPath",
            lambda source: len(source.chosen) == 1,
        ),
    )

    @property
    def mounted(self) -> VolumeSource | ImageSource | HostPathSource | None:
        """The source that is mounted at /models."""
        return self.volume or self.image or self.host_path

    @property
    def folder(self) -> str | None:
        """Path of the model inside what is mounted, where the source says it."""
        inside = self.volume or self.image
        return inside.path if inside is not None else None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The sources that are set, by attribute."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)
