"""The volumes of an engine's pod: weights, shared memory, and what must be writable."""

from __future__ import annotations

from vllm_operator.api.source import MODELS_PATH, Source
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest

HOME = "/var/lib/vllm"  # weights that are downloaded, compiled kernels, and every other cache
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
    if spec.engine.chat_template is not None:
        reference = spec.engine.chat_template.config_map
        items = [{"key": reference.key, "path": CHAT_TEMPLATE_FILE}]
        mount = {"name": "chat-template", "mountPath": CHAT_TEMPLATE_PATH, "readOnly": True}
        pairs.append(
            ({"name": "chat-template", "configMap": {"name": reference.name, "items": items}}, mount)
        )
    return [volume for volume, _ in pairs], [mount for _, mount in pairs]


def _weights(source: Source) -> Manifest:
    """The volume of a source that is mounted; empty for one that the engine downloads or has."""
    if source.volume is not None:
        return {"persistentVolumeClaim": {"claimName": source.volume.claim_name, "readOnly": True}}
    if source.image is not None:
        policy = {"pullPolicy": source.image.pull_policy} if source.image.pull_policy else {}
        return {"image": {"reference": source.image.reference, **policy}}
    if source.host_path is not None:
        return {"hostPath": {"path": source.host_path.path, "type": "Directory"}}
    return {}
