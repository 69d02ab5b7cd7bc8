"""What the operator knows of the cluster: tables that reflectors keep, and the models that kopf tells of.

A change of a child or a pod puts its model's key on the queue; a reconcile then reads these tables and asks
the API server for nothing that it could know.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator

from vllm_operator import names
from vllm_operator.clock import Clock
from vllm_operator.fleet import Fleet
from vllm_operator.inventory import NodeLedger, slim_node, slim_pod
from vllm_operator.kinds import (
    CHILDREN,
    DEPLOYMENTS,
    GROUPS,
    JOBS,
    NODES,
    PODS,
    Body,
    Kind,
    ObjectKey,
    is_controlled_by,
    key_of,
)
from vllm_operator.names import ModelKey
from vllm_operator.ownership import slimmed
from vllm_operator.reflector import Reflector, Source
from vllm_operator.render.facts import Holder, Node
from vllm_operator.settings import Settings
from vllm_operator.surroundings import Surroundings
from vllm_operator.upgrades import Upgrades


class World:
    """`enqueue`, to be set before `run`, is called with the key of each model that a change concerns."""

    def __init__(self, source: Source, settings: Settings, clock: Clock) -> None:
        self.fleet = Fleet()
        self.enqueue: Callable[[ModelKey], None] = lambda _key: None
        self._ledger = NodeLedger()
        self._pods = _ByModel()
        self._children = {kind: _ByModel() for kind in CHILDREN}
        self._clusterwide = not settings.watch_namespaces
        self._counts_gpus = settings.gpu.watch_nodes and self._clusterwide
        self._scopes = settings.watch_namespaces or ("",)
        self._reflectors: dict[tuple[Kind, str], Reflector] = {}
        self._nodes: Reflector | None = None
        self._build(source, clock)
        self.upgrades = Upgrades(settings.max_concurrent_rollouts, self._enqueue_late)
        self.surroundings = Surroundings(source, settings, clock, self._enqueue_late, self._model_told_of)

    def _build(self, source: Source, clock: Clock) -> None:
        ours = names.LABEL_MODEL
        for scope in self._scopes:
            for kind in CHILDREN:
                self._reflectors[kind, scope] = Reflector(
                    source,
                    kind,
                    clock,
                    functools.partial(self._child_changed, kind),
                    namespace=scope,
                    selector=ours,
                    project=slimmed,
                )
            self._reflectors[PODS, scope] = Reflector(
                source,
                PODS,
                clock,
                self._pod_changed,
                namespace=scope,
                selector="" if self._counts_gpus else ours,
                project=slim_pod,
            )
        if self._counts_gpus:
            self._nodes = Reflector(
                source, NODES, clock, self._ledger.note_node, project=slim_node, optional=True
            )

    async def run(self) -> None:
        """Follows the cluster until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for reflector in self._all():
                tasks.create_task(reflector.run(), name=f"watch {reflector.kind.plural}")

    async def synced(self) -> None:
        """Returns when children and pods are known. Nodes are not waited for: the right may be missing."""
        await asyncio.gather(*(reflector.synced.wait() for reflector in self._reflectors.values()))

    def last_activity(self) -> float:
        """The clock's reading when the loop that is longest silent last turned."""
        return min(reflector.last_activity for reflector in self._reflectors.values())

    def child(self, kind: Kind, key: ObjectKey) -> Body | None:
        return self._table(kind, key.namespace).table.get(key)

    def lacks_workload(self, key: ModelKey) -> bool:
        """Whether the model is there, and nothing that makes pods for it."""
        namespace, name = key
        return (
            key in self.fleet.models
            and self.child(DEPLOYMENTS, ObjectKey(namespace, names.engine_name(name))) is None
            and self.child(GROUPS, ObjectKey(namespace, names.group_name(name))) is None
        )

    def note(self, kind: Kind, body: Body) -> None:
        """What a write of ours answered."""
        self._table(kind, key_of(body).namespace).note(body)

    def owned_children(self, key: ModelKey, uid: str) -> list[tuple[Kind, Body]]:
        return [
            (kind, body)
            for kind, index in self._children.items()
            for body in index.of(key)
            if is_controlled_by(body, uid)
        ]

    def pods(self, key: ModelKey, uid: str, component: str = names.ENGINE) -> tuple[Body, ...]:
        """Those of this very model, and not of one that had its name before."""
        wanted = {names.LABEL_MODEL_UID: uid, names.LABEL_COMPONENT: component}.items()
        return tuple(body for body in self._pods.of(key) if wanted <= body["metadata"]["labels"].items())

    def nodes(self) -> tuple[Node, ...] | None:
        """None where they are not counted, or the right to list them is missing."""
        if self._nodes is None or not self._nodes.synced.is_set():
            return None
        return self._ledger.nodes(self._nodes.table.values())

    def holders(self, node: str, resource: str) -> tuple[Holder, ...]:
        """Who holds a resource of a node, those that hold most first."""
        return self._ledger.holders(node, resource)

    def _enqueue_late(self, key: ModelKey) -> None:
        self.enqueue(key)

    def _model_told_of(self, kind: str, key: ObjectKey) -> ModelKey | None:
        """Whose Pod or Job it is that an Event tells of."""
        return _model_of(self._table(JOBS if kind == JOBS.kind else PODS, key.namespace).table.get(key))

    def _all(self) -> Iterator[Reflector]:
        yield from self._reflectors.values()
        yield from self.surroundings.reflectors
        if self._nodes is not None:
            yield self._nodes

    def _table(self, kind: Kind, namespace: str) -> Reflector:
        return self._reflectors[kind, "" if self._clusterwide else namespace]

    def _child_changed(self, kind: Kind, old: Body | None, new: Body | None) -> None:
        for key in self._children[kind].note(old, new):
            if kind is DEPLOYMENTS:
                self.upgrades.note(key, new)
            self.enqueue(key)

    def _pod_changed(self, old: Body | None, new: Body | None) -> None:
        self._ledger.note(old, new)
        for key in self._pods.note(old, new):
            self.enqueue(key)


class _ByModel:
    """Objects by the model that their label names."""

    def __init__(self) -> None:
        self._found: dict[ModelKey, dict[ObjectKey, Body]] = defaultdict(dict)

    def of(self, key: ModelKey) -> tuple[Body, ...]:
        return tuple(self._found[key].values()) if key in self._found else ()

    def note(self, old: Body | None, new: Body | None) -> set[ModelKey]:
        """Returns the models that the change concerns."""
        before, after = _model_of(old), _model_of(new)
        if old is not None and before is not None:
            self._found[before].pop(key_of(old), None)
            if not self._found[before]:
                del self._found[before]
        if new is not None and after is not None:
            self._found[after][key_of(new)] = new
        return {key for key in (before, after) if key is not None}


def _model_of(body: Body | None) -> ModelKey | None:
    labels = (body["metadata"].get("labels") or {}) if body is not None else {}
    if body is None or names.LABEL_MODEL not in labels:
        return None
    return ModelKey(body["metadata"]["namespace"], labels[names.LABEL_MODEL])
