"""Whose pods are being replaced without an edit of the model, so that it goes one model at a time.

A newer operator, other settings or a changed Secret may want other pods of every model at once. Such a
rollout is marked on its Deployment (`names.ANNOTATION_UPGRADE`), which counts until it is complete: so an
operator that starts anew, or takes over, knows of it. One that fails, or was taken back, goes on counting
until the model is edited: the models behind it are spared what it met.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_operator import names
from vllm_operator.kinds import Body
from vllm_operator.names import ModelKey


class Upgrades:
    """At most `limit` at a time. `enqueue(key)` is called for a model that waited and may go now."""

    def __init__(self, limit: int, enqueue: Callable[[ModelKey], None]) -> None:
        self._limit, self._enqueue = limit, enqueue
        self._running: set[ModelKey] = set()  # as the Deployments tell
        self._entered: set[ModelKey] = set()  # about to be applied
        self._waiting: dict[ModelKey, None] = {}  # in order of arrival

    def note(self, key: ModelKey, deployment: Body | None) -> None:
        """Hears of every change of a model's Deployment."""
        if deployment is not None and is_under_way(deployment):
            self._running.add(key)
        elif key in self._running:
            self._running.discard(key)
            self._wake()

    def enter(self, key: ModelKey) -> bool:
        """Whether the model may go now; if not, it is enqueued when it may. Call `leave` after the apply."""
        busy = self._running | self._entered
        if key not in busy and len(busy) >= self._limit:
            self._waiting[key] = None
            return False
        self._waiting.pop(key, None)
        self._entered.add(key)
        return True

    def leave(self, key: ModelKey) -> None:
        """It is applied, or was refused: from now on what its Deployment tells counts."""
        if key in self._entered:
            self._entered.discard(key)
            self._wake()

    def forget(self, key: ModelKey) -> None:
        """It wants nothing any more; the next may go in its place."""
        if key in self._waiting:
            del self._waiting[key]
            self._wake()

    def _wake(self) -> None:
        """The next ones stay in the list until they enter or are forgotten, so none is lost on the way."""
        for key in list(self._waiting)[: self._limit - len(self._running | self._entered)]:
            self._enqueue(key)


def is_under_way(deployment: Body) -> bool:
    meta, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    said = meta.get("annotations") or {}
    if names.ANNOTATION_UPGRADE not in said:
        return False
    if names.ANNOTATION_ROLLED_BACK in said:
        return True
    seen = status.get("observedGeneration", 0) >= meta.get("generation", 0)
    counts = {status.get(field, 0) for field in ("replicas", "updatedReplicas", "availableReplicas")}
    return not (seen and counts == {spec.get("replicas", 1)})
