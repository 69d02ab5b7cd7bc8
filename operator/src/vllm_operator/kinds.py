"""The kinds that the operator reads or writes, with their static paths: no discovery, no cache files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_operator import names

Body = dict[str, Any]


class ObjectKey(NamedTuple):
    """`namespace` is empty for what has none."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Kind:
    """`metadata_only`: lists and watches ask for PartialObjectMetadata, so that no content is ever sent.
    https://kubernetes.io/docs/reference/using-api/api-concepts/#partialobjectmetadata

    `fixed` are the fields of the spec that no API server lets change: they are only sent at creation, and
    nothing that was sent then is taken away later.

    `kept`: an object that is no longer wanted stays until its model is deleted. `optional`: a cluster may not
    have the API. `bookmarks`: a watch of it is never silent for long.
    """

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True
    metadata_only: bool = False
    fixed: tuple[str, ...] = ()
    kept: bool = False
    optional: bool = False
    bookmarks: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = "/apis" if "/" in self.api_version else "/api"
        scope = f"/namespaces/{namespace}" if namespace and self.namespaced else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{root}/{self.api_version}{scope}/{self.plural}{tail}"


MODELS = Kind(names.API_VERSION, names.KIND, names.PLURAL)
DEPLOYMENTS = Kind("apps/v1", "Deployment", "deployments")
SERVICES = Kind("v1", "Service", "services")
GROUPS = Kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets", optional=True)
BUDGETS = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
PODS = Kind("v1", "Pod", "pods")
NODES = Kind("v1", "Node", "nodes", namespaced=False)
# The API server keeps no watch cache of Events (by default), from which bookmarks would come.
EVENTS = Kind("v1", "Event", "events", bookmarks=False)
SECRETS = Kind("v1", "Secret", "secrets", metadata_only=True)
AUTOSCALERS = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
LEASES = Kind("coordination.k8s.io/v1", "Lease", "leases")
CLAIMS = Kind(
    "v1",
    "PersistentVolumeClaim",
    "persistentvolumeclaims",
    fixed=("accessModes", "storageClassName"),
    kept=True,
)
JOBS = Kind("batch/v1", "Job", "jobs", fixed=("template",))
CHILDREN = (SERVICES, CLAIMS, JOBS, DEPLOYMENTS, GROUPS, BUDGETS, NETWORK_POLICIES)


def child_kind(manifest: Mapping[str, Any]) -> Kind:
    """The kind of a rendered manifest; KeyError for one that nobody watches."""
    return {(kind.api_version, kind.kind): kind for kind in CHILDREN}[
        manifest["apiVersion"], manifest["kind"]
    ]


def changeable(kind: Kind, manifest: Body) -> Body:
    """What of a manifest is applied to an object that exists."""
    if not kind.fixed:
        return manifest
    spec = {name: value for name, value in manifest["spec"].items() if name not in kind.fixed}
    return {**manifest, "spec": spec}


def key_of(body: Mapping[str, Any]) -> ObjectKey:
    return ObjectKey(body["metadata"].get("namespace", ""), body["metadata"]["name"])


def version_of(body: Mapping[str, Any]) -> int:
    """Greater is newer. Comparable since Kubernetes 1.35 by contract, and in practice always."""
    return int(body["metadata"].get("resourceVersion") or 0)


def uid_of(body: Mapping[str, Any]) -> str:
    return str(body["metadata"].get("uid", ""))


def without_managed_fields(body: Body) -> Body:
    """Often a half of an object, and never read here."""
    return {
        **body,
        "metadata": {key: value for key, value in body["metadata"].items() if key != "managedFields"},
    }


def is_controlled_by(body: Mapping[str, Any], uid: str) -> bool:
    owners = body["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner["uid"] == uid for owner in owners)
