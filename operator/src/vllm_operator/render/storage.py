"""The volumes of an engine's pod: weights, shared memory, and what must be writable."""

from __future__ import annotations

from vllm_operator.api.source import MODELS_PATH
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Manifest

HOME = "/var/lib/vllm"  # weights that are downloaded, compiled kernels, and every other cache
_WEIGHTS: Manifest = {"name": "weights", "mountPath": MODELS_PATH, "readOnly": True}


def volumes_and_mounts(spec: Spec) -> tuple[list[Manifest], list[Manifest]]:
    """`/dev/shm` is in memory, and counts as it: a container's own 64 MiB stop tensor parallelism."""
    pairs: list[tuple[Manifest, Manifest]] = [
        ({"name": "home", "emptyDir": {}}, {"name": "home", "mountPath": HOME}),
        ({"name": "shm", "emptyDir": {"medium": "Memory"}}, {"name": "shm", "mountPath": "/dev/shm"}),  # noqa: S108
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),  # noqa: S108
    ]
    if spec.source.volume is not None:
        claim = {"claimName": spec.source.volume.claim_name, "readOnly": True}
        pairs.append(({"name": "weights", "persistentVolumeClaim": claim}, _WEIGHTS))
    if spec.source.host_path is not None:
        folder = {"path": spec.source.host_path.path, "type": "Directory"}
        pairs.append(({"name": "weights", "hostPath": folder}, _WEIGHTS))
    return [volume for volume, _ in pairs], [mount for _, mount in pairs]
