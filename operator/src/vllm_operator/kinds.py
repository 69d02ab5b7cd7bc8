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
    """

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True
    metadata_only: bool = False

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = "/apis" if "/" in self.api_version else "/api"
        scope = f"/namespaces/{namespace}" if namespace and self.namespaced else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{root}/{self.api_version}{scope}/{self.plural}{tail}"


MODELS = Kind(names.API_VERSION, names.KIND, names.PLURAL)
DEPLOYMENTS = Kind("apps/v1", "Deployment", "deployments")
SERVICES = Kind("v1", "Service", "services")
BUDGETS = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
PODS = Kind("v1", "Pod", "pods")
NODES = Kind("v1", "Node", "nodes", namespaced=False)
EVENTS = Kind("v1", "Event", "events")
SECRETS = Kind("v1", "Secret", "secrets", metadata_only=True)
AUTOSCALERS = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
LEASES = Kind("coordination.k8s.io/v1", "Lease", "leases")
CHILDREN = (SERVICES, DEPLOYMENTS, BUDGETS, NETWORK_POLICIES)


def child_kind(manifest: Mapping[str, Any]) -> Kind:
    """The kind of a rendered manifest; KeyError for one that nobody watches."""
    return {(kind.api_version, kind.kind): kind for kind in CHILDREN}[
        manifest["apiVersion"], manifest["kind"]
    ]


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
