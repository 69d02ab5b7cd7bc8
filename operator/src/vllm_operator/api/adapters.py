"""LoRA adapters that an engine serves beside its model: `spec.adapters`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vllm_operator.api.source import INSIDE, PATH_PATTERN
from vllm_operator.api.values import HostPath, Image, ObjectName, Rule, Section, ServedName, text

ADAPTERS_PATH = "/adapters"  # where volumes with adapters are mounted, each in a folder of its own
REPOSITORY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"


class HubAdapter(Section):
    """Downloaded by the engine from the Hugging Face Hub, at its main branch: vLLM knows no other."""

    id: Annotated[str, text(256, REPOSITORY_PATTERN)] = Field(
        description="Repository of the adapter, for example acme/sql-lora. The model's own token is used."
    )


class LocalAdapter(Section):
    """A folder that the engine's container has: in its image, or in what the model's source mounts."""

    path: HostPath = Field(
        description="Path in the container, for example /models/adapters/sql where the model's source is a "
        "volume."
    )


class VolumeAdapter(Section):
    """On a PersistentVolumeClaim, mounted read-only."""

    claim_name: ObjectName = Field(description="A PersistentVolumeClaim in the model's namespace.")
    path: Annotated[str, text(512, PATH_PATTERN)] | None = Field(
        None, description="Folder of the adapter inside the claim. Default: the claim's root."
    )

    rules = (INSIDE,)


class ImageAdapter(Section):
    """An OCI image, mounted read-only. Needs Kubernetes 1.36 or newer."""

    reference: Image = Field(description="Image of the adapter, pulled with spec.imagePullSecrets.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Default: IfNotPresent, and Always for the tag latest."
    )
    path: Annotated[str, text(512, PATH_PATTERN)] | None = Field(
        None, description="Folder of the adapter inside the image. Default: the image's root."
    )

    rules = (INSIDE,)


class AdapterSource(Section):
    """Exactly one of the sources."""

    hugging_face: HubAdapter | None = Field(None, description="Download from the Hugging Face Hub.")
    local: LocalAdapter | None = Field(None, description="A folder in the engine's container.")
    volume: VolumeAdapter | None = Field(None, description="A folder on a PersistentVolumeClaim.")
    image: ImageAdapter | None = Field(None, description="An OCI image.")

    rules = (
        Rule(
            "[has(self.huggingFace), has(self.local), has(self.volume), has(self.image)]"
            ".exists_one(set, set)",
            "set exactly one of huggingFace, local, volume and image",
            lambda source: [source.hugging_face, source.local, source.volume, source.image].count(None) == 3,
        ),
    )


class Adapter(Section):
    """One LoRA adapter."""

    name: ServedName = Field(
        description="Short name by which callers ask for the adapter; <namespace>/<model>:<name> always "
        "works."
    )
    source: AdapterSource = Field(description="Where its weights come from.")

    @property
    def mounted(self) -> VolumeAdapter | ImageAdapter | None:
        return self.source.volume or self.source.image


def adapter_folder(index: int) -> str:
    """Where the volume of the adapter at that place of the list is mounted; its name may be no file's."""
    return f"{ADAPTERS_PATH}/{index}"


def adapter_path(index: int, adapter: Adapter) -> str:
    """What vLLM loads: a path in the container, or a repository of the Hub."""
    source = adapter.source
    if source.hugging_face is not None:
        return source.hugging_face.id
    if source.local is not None:
        return source.local.path
    inside = adapter.mounted.path if adapter.mounted is not None else None
    return f"{adapter_folder(index)}/{inside}" if inside else adapter_folder(index)
