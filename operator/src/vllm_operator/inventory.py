"""What is free on the nodes, kept up to date pod by pod: their offers less what the pods on them ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from vllm_operator import names
from vllm_operator.kinds import Body, ObjectKey, key_of
from vllm_operator.render.facts import Holder, Node, Taint
from vllm_operator.render.requests import counted, requested

_KEPT_METADATA = ("name", "namespace", "uid", "resourceVersion")


def slim_pod(pod: Body) -> Body:
    """What is kept of a pod in memory: of strangers what they hold of a node, of ours what a status needs."""
    meta, spec = pod["metadata"], pod.get("spec") or {}
    kept: Body = {
        "metadata": {key: meta[key] for key in _KEPT_METADATA if key in meta},
        "spec": {"nodeName": spec.get("nodeName", "")},
        "holds": requested(spec)
        if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        else {},
    }
    if names.LABEL_MODEL in (meta.get("labels") or {}):
        more = ("labels", "annotations", "creationTimestamp", "deletionTimestamp")
        kept["metadata"] |= {key: meta[key] for key in more if key in meta}
        kept["status"] = pod.get("status") or {}
    return kept


def slim_node(node: Body) -> Body:
    """A node without the list of its images and its heartbeats, so that these are no change."""
    meta, spec, status = node["metadata"], node.get("spec") or {}, node.get("status") or {}
    ready: Body = next((item for item in status.get("conditions") or () if item["type"] == "Ready"), {})
    return {
        "metadata": {key: meta[key] for key in (*_KEPT_METADATA, "labels") if key in meta},
        "taints": spec.get("taints") or [],
        "schedulable": not spec.get("unschedulable") and ready.get("status") == "True",
        "offers": counted(status.get("allocatable") or {}),
    }


class NodeLedger:
    """Counts what pods hold per node; told of every change of a pod, it never reads all of them again."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._pods: dict[str, dict[ObjectKey, Body]] = defaultdict(dict)
        self._known: dict[str, Node] = {}  # until the node, or a pod on it, changes

    def note(self, old: Body | None, new: Body | None) -> None:
        for body, sign in ((old, -1), (new, 1)):
            if body is not None and (node := body["spec"]["nodeName"]):
                for name, count in body["holds"].items():
                    self._held[node][name] += sign * count
                self._known.pop(node, None)
        if old is not None:
            self._pods[old["spec"]["nodeName"]].pop(key_of(old), None)
        if new is not None and (node := new["spec"]["nodeName"]):
            self._pods[node][key_of(new)] = new
        if old is not None and not self._pods[node := old["spec"]["nodeName"]]:
            del self._pods[node]  # it may have gone, and an autoscaler gives each new one another name
            self._held.pop(node, None)

    def note_node(self, old: Body | None, new: Body | None) -> None:
        """A free GPU is the scheduler's business: no model is worked on because of it."""
        for body in (old, new):
            if body is not None:
                self._known.pop(body["metadata"]["name"], None)

    def holders(self, node: str, resource: str) -> tuple[Holder, ...]:
        """Who holds a resource of a node, those that hold most first."""
        held = [
            Holder(key.namespace, key.name, count)
            for key, body in self._pods.get(node, {}).items()
            if (count := body["holds"].get(resource, 0))
        ]
        return tuple(sorted(held, key=lambda holder: (-holder.count, holder.namespace, holder.name)))

    def nodes(self, bodies: Iterable[Body]) -> tuple[Node, ...]:
        """Every reconcile asks for all of them, and few have changed since the one before."""
        return tuple(self._known.get(body["metadata"]["name"]) or self._made(body) for body in bodies)

    def _made(self, body: Body) -> Node:
        node = self._known[body["metadata"]["name"]] = self._node(body)
        return node

    def _node(self, body: Body) -> Node:
        held = self._held.get(body["metadata"]["name"], {})
        return Node(
            name=body["metadata"]["name"],
            labels=body["metadata"].get("labels") or {},
            taints=tuple(
                Taint(item["key"], item.get("value", ""), item["effect"]) for item in body["taints"]
            ),
            schedulable=body["schedulable"],
            free={name: count - held.get(name, 0) for name, count in body["offers"].items()},
            offers=body["offers"],
        )
