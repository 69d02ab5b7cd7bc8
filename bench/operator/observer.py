"""What happens in the cluster and when, seen by watches of the bench's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from programs import BenchError

from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster
from vllm_operator.kinds import Body, Kind, key_of, uid_of
from vllm_operator.reflector import Reflector

LOOK_SECONDS = 0.05  # between two looks at what is waited for; the times are those of the events
IsReady = Callable[[Body], bool]


@dataclass
class Seen:
    """One object: `first` is when its uid was seen first, `since` when `generation` or `ready` changed."""

    uid: str
    generation: int
    ready: bool
    labels: Mapping[str, str]
    first: float
    since: float


class Observer:
    """Follows the objects of one namespace, by kind; times are of `time.monotonic()`."""

    def __init__(self, cluster: Cluster, namespace: str, kinds: Mapping[Kind, IsReady]) -> None:
        self.seen: dict[Kind, dict[str, Seen]] = {kind: {} for kind in kinds}
        # also of what `Seen` does not hold
        self.last_change: dict[Kind, float] = dict.fromkeys(kinds, time.monotonic())
        self._reflectors = [
            Reflector(
                cluster, kind, SystemClock(), self._noter(kind), namespace=namespace, project=_slim(is_ready)
            )
            for kind, is_ready in kinds.items()
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(reflector.run()) for reflector in self._reflectors]
        await asyncio.gather(*(reflector.synced.wait() for reflector in self._reflectors))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, holds: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise BenchError(f"not within {seconds:.0f} s: {what}; seen: {self.counts()}")
            await asyncio.sleep(LOOK_SECONDS)

    def counts(self) -> str:
        """For people: how many objects there are and how many are ready."""
        parts = (
            f"{sum(seen.ready for seen in found.values())} of {len(found)} {kind.plural} ready"
            for kind, found in self.seen.items()
        )
        return ", ".join(parts)

    def _noter(self, kind: Kind) -> Callable[[Body | None, Body | None], None]:
        table = self.seen[kind]

        def note(old: Body | None, new: Body | None) -> None:
            self.last_change[kind] = now = time.monotonic()
            if new is None:
                table.pop(key_of(old or {}).name, None)
                return
            before = table.get(key_of(new).name)
            same = before is not None and before.uid == uid_of(new)
            fact = (new["metadata"].get("generation", 0), new["ready"])
            unchanged = same and before is not None and (before.generation, before.ready) == fact
            table[key_of(new).name] = Seen(
                uid=uid_of(new),
                generation=fact[0],
                ready=fact[1],
                labels=new["metadata"].get("labels") or {},
                first=before.first if before is not None and same else now,
                since=before.since if before is not None and unchanged else now,
            )

        return note


def _slim(is_ready: IsReady) -> Callable[[Body], Body]:
    kept = ("name", "namespace", "uid", "resourceVersion", "generation", "labels")

    def slim(body: Body) -> Body:
        metadata = {key: value for key, value in body["metadata"].items() if key in kept}
        return {"metadata": metadata, "ready": is_ready(body)}

    return slim


def condition_is_true(body: Body, kind: str) -> bool:
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(item["type"] == kind and item["status"] == "True" for item in conditions)


def exists(_body: Body) -> bool:
    return True


def pod_serves(body: Body) -> bool:
    return "deletionTimestamp" not in body["metadata"] and condition_is_true(body, "Ready")


def is_rolled_out(body: Body) -> bool:
    """As `kubectl rollout status` has it: the current spec's pods are all there, available, and alone."""
    spec, status = body["spec"], body.get("status") or {}
    wanted = spec.get("replicas", 1)
    current = status.get("observedGeneration", 0) >= body["metadata"]["generation"]
    pods = {status.get(name, 0) for name in ("replicas", "updatedReplicas", "availableReplicas")}
    return bool(current and pods == {wanted})


def replicas_ready(body: Body) -> bool:
    """A Model of KubeAI, which has no conditions: as many pods as its spec wants, and all of them ready."""
    replicas, wanted = (body.get("status") or {}).get("replicas") or {}, body["spec"].get("replicas", 0)
    return bool(wanted and replicas.get("all") == replicas.get("ready") == wanted)


def model_serves(body: Body) -> bool:
    """A VLLMModel that is Ready with its current spec, and nothing is in progress any more."""
    status = body.get("status") or {}
    current = status.get("observedGeneration", 0) >= body["metadata"]["generation"]
    settled = not condition_is_true(body, "Reconciling")
    return bool(current and settled and condition_is_true(body, "Ready"))
