"""The object store behind the fake API server: what etcd, the registry and the garbage collector do together.

Semantics kept: one resourceVersion counter for everything, generation counts changes of the spec, uid and
creationTimestamp are the server's, status is written only through its subresource, server-side apply removes
what the same manager applied before and leaves out now, dependents go with their owners, a compacted history
is 410. Semantics left out: conflicts between field managers (apply needs force), admission, finalizers.
https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

Json = dict[str, Any]
Key = tuple[str, str]  # namespace ("" for cluster-scoped), name


class Refused(Exception):
    """An answer other than success: an HTTP status and a machine-readable reason of `metav1.Status`."""

    def __init__(self, code: int, reason: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code, self.reason, self.message = code, reason, message


@dataclasses.dataclass(frozen=True)
class Resource:
    """One served kind. `path` is group/version, "v1" for the core group."""

    path: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = True


VLLM_MODELS = Resource("vllm-fleet.dev/v1alpha1", "vllmmodels", "VLLMModel")
RESOURCES = (
    VLLM_MODELS,
    Resource("apps/v1", "deployments", "Deployment"),
    Resource("apps/v1", "replicasets", "ReplicaSet"),
    Resource("v1", "services", "Service"),
    Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", has_status=False),
    Resource("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
    Resource("batch/v1", "jobs", "Job"),
    Resource("leaderworkerset.x-k8s.io/v1", "leaderworkersets", "LeaderWorkerSet"),
    Resource("v1", "pods", "Pod"),
    Resource("v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Resource("v1", "secrets", "Secret", has_status=False),
    Resource("v1", "configmaps", "ConfigMap", has_status=False),
    Resource("v1", "events", "Event", has_status=False),
    Resource("v1", "nodes", "Node", namespaced=False),
    Resource("v1", "namespaces", "Namespace", namespaced=False),
    Resource("discovery.k8s.io/v1", "endpointslices", "EndpointSlice", has_status=False),
    Resource("coordination.k8s.io/v1", "leases", "Lease", has_status=False),
)

# List fields that are merged by a key in server-side apply; every other list is atomic.
MERGE_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "volumeMounts": ("mountPath",),
    "conditions": ("type",),
    "ownerReferences": ("uid",),
    "ports": ("containerPort", "port"),
    "topologySpreadConstraints": ("topologyKey",),
}
SERVER_FIELDS = (
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "deletionTimestamp",
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One committed write; `old` or `new` is None for a creation or a deletion."""

    version: int
    resource: Resource
    old: Json | None
    new: Json | None


class Store:
    """All objects, their history since the last compaction, and listeners that hear of each change."""

    def __init__(self) -> None:
        self.version = 1000
        self.compacted = 0
        self.history: list[Change] = []
        self.listeners: list[Callable[[Change], None]] = []
        self._objects: dict[Resource, dict[Key, Json]] = {resource: {} for resource in RESOURCES}
        self._applied: dict[tuple[str, str, bool], Json] = {}  # uid, manager, status?
        self._created: dict[tuple[str, str], Json] = {}  # uid, manager: what a POST set
        self._serial = itertools.count(1)

    def get(self, resource: Resource, key: Key) -> Json:
        found = self._objects[resource].get(key)
        if found is None:
            raise Refused(404, "NotFound", f'{resource.plural} "{key[1]}" not found')
        return copy.deepcopy(found)

    def objects(self, resource: Resource, namespace: str = "") -> list[Json]:
        """In the order of namespace and name, as the real server answers."""
        objects = sorted(self._objects[resource].items())
        return [copy.deepcopy(body) for key, body in objects if namespace in ("", key[0])]

    def create(
        self, resource: Resource, namespace: str, body: Json, *, manager: str = "", dry_run: bool = False
    ) -> Json:
        """POST. What it sets is booked as the manager's Update, which an apply does not take away."""
        body = copy.deepcopy(body)
        meta = body.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = f"{meta['generateName']}{next(self._serial):05x}"
        if not meta.get("name"):
            raise Refused(422, "Invalid", "metadata.name: Required value")
        key = (namespace if resource.namespaced else "", meta["name"])
        if key in self._objects[resource]:
            raise Refused(409, "AlreadyExists", f'{resource.plural} "{key[1]}" already exists')
        if resource.namespaced:
            meta["namespace"] = namespace
        if resource.has_status:
            body.pop("status", None)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
        body |= {"apiVersion": resource.path, "kind": resource.kind}
        if manager:
            meta["managedFields"] = [{"manager": manager, "operation": "Update"}]
            self._created[meta["uid"], manager] = copy.deepcopy(body)
        return body if dry_run else self._commit(resource, key, body)

    def book(self, resource: Resource, key: Key, meta: Json) -> Json:
        """Other managedFields, by a merge patch of this metadata: an Update that becomes an Apply."""
        live = self.get(resource, key)
        for field in ("uid", "resourceVersion"):
            if meta[field] != live["metadata"][field]:
                raise Refused(409, "Conflict", f"metadata.{field}: the object has been modified")
        for entry in meta["managedFields"]:
            made = self._created.pop((live["metadata"]["uid"], entry["manager"]), None)
            if entry["operation"] == "Apply" and made is not None:
                self._applied[live["metadata"]["uid"], entry["manager"], False] = made
        live["metadata"]["managedFields"] = meta["managedFields"]
        return self._commit(resource, key, live)

    def replace(
        self, resource: Resource, key: Key, body: Json, *, status: bool, dry_run: bool = False
    ) -> Json:
        """PUT. A resourceVersion in the body is a precondition."""
        live = self.get(resource, key)
        meta = body.get("metadata", {})
        for field in ("uid", "resourceVersion"):
            if meta.get(field) not in (None, live["metadata"][field]):
                raise Refused(409, "Conflict", f"metadata.{field}: the object has been modified")
        merged = self._with_server_fields(resource, live, copy.deepcopy(body), status=status)
        return merged if dry_run else self._commit(resource, key, merged)

    def merge(
        self, resource: Resource, key: Key, patch: Json, *, status: bool, dry_run: bool = False
    ) -> Json:
        """A JSON merge patch (RFC 7396)."""
        live = self.get(resource, key)
        merged = merge_patch(copy.deepcopy(live), patch)
        return self.replace(resource, key, merged, status=status, dry_run=dry_run)

    def apply(
        self, resource: Resource, key: Key, wanted: Json, manager: str, *, status: bool, dry_run: bool = False
    ) -> tuple[Json, bool]:
        """Server-side apply with force. Returns the object, and whether it was created."""
        uid = wanted.get("metadata", {}).get("uid")
        if key not in self._objects[resource]:
            if status:
                raise Refused(404, "NotFound", f'{resource.plural} "{key[1]}" not found')
            if uid:
                raise Refused(409, "Conflict", "Precondition failed: UID in precondition: the object is gone")
            body = self.create(resource, key[0], wanted, dry_run=dry_run)
            self._remember(body, manager, status, wanted, dry_run)
            return body, True
        live = self.get(resource, key)
        if uid not in (None, live["metadata"]["uid"]):
            raise Refused(409, "Conflict", "Precondition failed: UID in precondition")
        before = self._applied.get((live["metadata"]["uid"], manager, status), {})
        merged = apply_patch(copy.deepcopy(live), before, wanted)
        body = self.replace(resource, key, _without_version(merged), status=status, dry_run=dry_run)
        self._remember(body, manager, status, wanted, dry_run)
        return body, False

    def delete(self, resource: Resource, key: Key, *, uid: str | None = None) -> Json:
        """At once and with all dependents: no finalizers, no grace period."""
        body = self.get(resource, key)
        if uid not in (None, body["metadata"]["uid"]):
            raise Refused(409, "Conflict", "Precondition failed: UID in precondition")
        del self._objects[resource][key]
        self._record(resource, body, None)
        self.collect_garbage()
        return body

    def collect_garbage(self) -> None:
        """Deletes what has owners of which none exists, as the controller-manager would."""
        living = {body["metadata"]["uid"] for bodies in self._objects.values() for body in bodies.values()}
        for resource, key, owners in list(self._owned()):
            if not owners & living and key in self._objects[resource]:
                self.delete(resource, key)

    def compact(self) -> None:
        """Forgets the history: a watch from any earlier resourceVersion is answered with 410."""
        self.history.clear()
        self.compacted = self.version

    def _owned(self) -> Iterator[tuple[Resource, Key, set[str]]]:
        for resource, bodies in self._objects.items():
            for key, body in bodies.items():
                if owners := body["metadata"].get("ownerReferences"):
                    yield resource, key, {owner["uid"] for owner in owners}

    def _with_server_fields(self, resource: Resource, live: Json, body: Json, *, status: bool) -> Json:
        if status:
            return {**live, "status": body.get("status", {})}
        meta = body.setdefault("metadata", {})
        for field in (*SERVER_FIELDS, "name", "namespace"):
            meta.pop(field, None)
            if field in live["metadata"]:
                meta[field] = live["metadata"][field]
        body |= {"apiVersion": resource.path, "kind": resource.kind}
        if resource.has_status:
            body.pop("status", None)
            if "status" in live:
                body["status"] = live["status"]
        if body.get("spec") != live.get("spec"):
            meta["generation"] = live["metadata"]["generation"] + 1
        return body

    def _remember(self, body: Json, manager: str, status: bool, wanted: Json, dry_run: bool) -> None:
        if not dry_run:
            self._applied[body["metadata"]["uid"], manager, status] = copy.deepcopy(wanted)

    def _commit(self, resource: Resource, key: Key, body: Json) -> Json:
        old = self._objects[resource].get(key)
        if old is not None and _without_version(old) == _without_version(body):
            return copy.deepcopy(old)  # the real server does not write what changes nothing
        self._objects[resource][key] = body
        self._record(resource, old, body)
        self.collect_garbage()
        return copy.deepcopy(body)

    def _record(self, resource: Resource, old: Json | None, new: Json | None) -> None:
        self.version += 1
        if new is not None:
            new["metadata"]["resourceVersion"] = str(self.version)
        elif old is not None:
            old["metadata"]["resourceVersion"] = str(self.version)
        change = Change(self.version, resource, copy.deepcopy(old), copy.deepcopy(new))
        self.history.append(change)
        for listener in list(self.listeners):
            listener(change)


def _without_version(body: Json) -> Json:
    return {**body, "metadata": {k: v for k, v in body["metadata"].items() if k != "resourceVersion"}}


def merge_patch(live: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    live = live if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            live.pop(key, None)
        else:
            live[key] = merge_patch(live.get(key), value)
    return live


def apply_patch(live: Any, before: Any, wanted: Any, field: str = "") -> Any:
    """`wanted` over `live`; what this manager applied `before` but leaves out now goes."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        before = before if isinstance(before, dict) else {}
        for key in before.keys() - wanted.keys():
            live.pop(key, None)
        for key, value in wanted.items():
            live[key] = apply_patch(live.get(key), before.get(key), value, key)
        return live
    if field in MERGE_KEYS and isinstance(wanted, list) and isinstance(live, list):
        return _apply_list(live, before if isinstance(before, list) else [], wanted, MERGE_KEYS[field])
    return copy.deepcopy(wanted)


def _apply_list(
    live: list[Json], before: list[Json], wanted: list[Json], names: tuple[str, ...]
) -> list[Json]:
    def by_key(items: list[Json]) -> dict[Any, Json]:
        return {next((item[name] for name in names if name in item), None): item for item in items}

    old, previous, new = by_key(live), by_key(before), by_key(wanted)
    kept = [item for key, item in old.items() if key not in new and key not in previous]
    return [apply_patch(old.get(key), previous.get(key), item) for key, item in new.items()] + kept
