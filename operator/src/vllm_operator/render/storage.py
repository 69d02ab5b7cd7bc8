"""The volumes of an engine's pod: weights, shared memory, and what must be writable."""

from __future__ import annotations

from vllm_operator.api.adapters import Adapter, adapter_folder
from vllm_operator.api.source import MODELS_PATH, Source
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest

HOME = "/var/lib/vllm"  # weights that are downloaded, compiled kernels, and every other cache
ADAPTER_VOLUME = "adapter-"
CHAT_TEMPLATE_PATH, CHAT_TEMPLATE_FILE = "/etc/vllm-fleet/chat-template", "template.jinja"


def volumes_and_mounts(spec: Spec) -> tuple[list[Manifest], list[Manifest]]:
    """`/dev/shm` is in memory, and counts as it: a container's own 64 MiB stop tensor parallelism."""
    limit = spec.resources.shared_memory
    memory = {"medium": "Memory", **({"sizeLimit": str(limit)} if limit is not None else {})}
    pairs: list[tuple[Manifest, Manifest]] = [
        ({"name": "home", "emptyDir": {}}, {"name": "home", "mountPath": HOME}),
        ({"name": "shm", "emptyDir": memory}, {"name": "shm", "mountPath": "/dev/shm"}),  # noqa: S108
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),  # noqa: S108
    ]
    if weights := _weights(spec.source):
        mount = {"name": "weights", "mountPath": MODELS_PATH, "readOnly": True}
        pairs.append(({"name": "weights", **weights}, mount))
    for index, adapter in enumerate(spec.adapters):
        if found := _adapter(adapter):
            name = f"{ADAPTER_VOLUME}{index}"
            mount = {"name": name, "mountPath": adapter_folder(index), "readOnly": True}
            pairs.append(({"name": name, **found}, mount))
    if spec.engine.chat_template is not None:
        reference = spec.engine.chat_template.config_map
        items = [{"key": reference.key, "path": CHAT_TEMPLATE_FILE}]
        mount = {"name": "chat-template", "mountPath": CHAT_TEMPLATE_PATH, "readOnly": True}
        pairs.append(
            ({"name": "chat-template", "configMap": {"name": reference.name, "items": items}}, mount)
        )
    return [volume for volume, _ in pairs], [mount for _, mount in pairs]


def field_of_volume(name: str) -> str:
    """The field of the spec that a rendered volume stands for."""
    index = name.removeprefix(ADAPTER_VOLUME)
    return f"spec.adapters[{index}].source" if index != name else "spec.source"


def _weights(source: Source) -> Manifest:
    """The volume of a source that is mounted; empty for one that the engine downloads or has."""
    if source.volume is not None:
        return _claim(source.volume.claim_name)
    if source.image is not None:
        return _image(source.image.reference, source.image.pull_policy)
    if source.host_path is not None:
        return {"hostPath": {"path": source.host_path.path, "type": "Directory"}}
    return {}


def _adapter(adapter: Adapter) -> Manifest:
    """Likewise, of an adapter's source."""
    source = adapter.source
    if source.volume is not None:
        return _claim(source.volume.claim_name)
    return _image(source.image.reference, source.image.pull_policy) if source.image is not None else {}


def _claim(name: str) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}


def _image(reference: str, pull_policy: str | None) -> Manifest:
    return {"image": {"reference": reference, **({"pullPolicy": pull_policy} if pull_policy else {})}}
