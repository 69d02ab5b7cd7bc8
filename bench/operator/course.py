"""The course that every subject runs: one model at a time, many at once, idling, a restart."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from access import Access
from figures import Idle, Lap, Phase, Restart, Singles, Spent
from flows import Client, writes
from observer import Observer, Seen
from programs import BenchError, Program
from subjects import NAMESPACE, Subject
from writer import writer

from vllm_operator.kinds import DEPLOYMENTS, PODS, Body, Kind, ObjectKey

# What the garbage collector still deletes when those are gone: it would slow the next lap down.
LEFTOVERS = (
    Kind("apps/v1", "ReplicaSet", "replicasets", metadata_only=True),
    Kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices", metadata_only=True),
    Kind("v1", "Endpoints", "endpoints", metadata_only=True),
)
SETTLE_SECONDS = 4.0  # after the last model is ready, for what trails behind: a worker of KubeAI rests for 3
QUIET_SECONDS = 10.0  # without a change the cluster has nothing left to do
LIMIT_SECONDS = 1800.0


@dataclass(frozen=True)
class Track:
    """What all laps share. `workers`: requests at once, of the operator, the bare loop and the user alike."""

    access: Access
    observer: Observer
    workers: int
    bare: Client
    bare_kubeconfig: Path

    def all(self, kind: Kind) -> list[Seen]:
        return list(self.observer.seen[kind].values())

    def since(self, started: float, kinds: Iterable[Kind]) -> float:
        """Seconds until the last object of these kinds took its present state."""
        return max(seen.since for kind in kinds for seen in self.all(kind)) - started

    async def until_ready(self, kind: Kind, count: int, after: dict[str, int]) -> None:
        """All are there and ready, each with a generation above the one given for it."""

        def holds() -> bool:
            found = self.observer.seen[kind]
            newer = (seen.generation > after.get(name, 0) for name, seen in found.items())
            return len(found) == count and all(newer) and all(seen.ready for seen in found.values())

        await self.observer.until(holds, f"{count} {kind.plural} are ready", LIMIT_SECONDS)

    async def until_children(self, kinds: Iterable[Kind], count: int) -> None:
        def holds() -> bool:
            return all(len(self.observer.seen[kind]) == count for kind in kinds)

        await self.observer.until(holds, f"the children of {count} models exist", LIMIT_SECONDS)

    async def until_empty(self) -> None:
        def holds() -> bool:
            return not any(self.observer.seen.values())

        await self.observer.until(holds, "everything is deleted", LIMIT_SECONDS)

    async def until_settled(self) -> None:
        """Nothing of the lap before is left."""
        for kind in LEFTOVERS:
            for _ in range(int(LIMIT_SECONDS)):
                if not (await self.access.cluster.list(kind, NAMESPACE)).items:
                    break
                await asyncio.sleep(1)
            else:
                raise BenchError(f"{kind.plural} of the lap before stay")

    def children_exist(self, kinds: Iterable[Kind], started: float) -> float:
        """Seconds until the last of them was there."""
        return max(seen.first for kind in kinds for seen in self.all(kind)) - started

    async def until_quiet(self, own: Kind) -> None:
        """The controllers, which have limits, have told all that they had to tell. What an operator writes
        into its own kind does not count: one writes without end.
        """

        def holds() -> bool:
            moments = (moment for kind, moment in self.observer.last_change.items() if kind != own)
            return time.monotonic() - max(moments) > QUIET_SECONDS

        await self.observer.until(holds, "nothing changes any more", LIMIT_SECONDS)

    def generations(self, kind: Kind) -> dict[str, int]:
        return {name: seen.generation for name, seen in self.observer.seen[kind].items()}


class Meter:
    """What a client sends and a process burns between two moments."""

    def __init__(self, access: Access, client: Client, program: Program | None) -> None:
        self._access, self._client, self._program = access, client, program
        self._begin = Spent()

    async def start(self) -> None:
        self._begin = await self._read()

    async def spent(self) -> Spent:
        begin, now = self._begin, await self._read()
        requests = now.requests - begin.requests
        return Spent(requests, now.cpu - begin.cpu, now.server_cpu - begin.server_cpu)

    async def _read(self) -> Spent:
        cpu = self._program.cpu_seconds() if self._program is not None else 0.0
        requests, server_cpu = await self._access.usage(self._client)
        return Spent(requests, cpu, server_cpu)


def names(count: int) -> list[str]:
    return [f"m{number:04d}" for number in range(count)]


def with_uid(body: Body, seen: Seen) -> Body:
    return {**body, "metadata": {**body["metadata"], "uid": seen.uid}}


def rendered(model: Body) -> list[Body]:
    """What `vllm-operator render` prints for one model, without the owner that a bare loop has not."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(model))
        file.flush()
        command = [str(Path(sys.executable).with_name("vllm-operator")), "render", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bodies = list(yaml.safe_load_all(output))
    for body in bodies:
        del body["metadata"]["ownerReferences"]
    return bodies


def written(bodies: list[Body], kinds: Iterable[Kind]) -> list[Body]:
    """What the bare loop writes for a model: the rendered children, or for a peer that makes Pods the Pod."""
    if PODS not in kinds:
        return bodies
    return [_as_pod(body) for body in bodies if body["kind"] == DEPLOYMENTS.kind]


def _as_pod(deployment: Body) -> Body:
    """The Pod that a Deployment's ReplicaSet would make."""
    metadata, template = deployment["metadata"], deployment["spec"]["template"]
    named = {"name": metadata["name"], "namespace": metadata["namespace"]}
    return {
        "apiVersion": PODS.api_version,
        "kind": PODS.kind,
        "metadata": {**template["metadata"], **named},
        "spec": template["spec"],
    }


async def create_models(track: Track, subject: Subject, program: Program, count: int) -> Phase:
    meter = Meter(track.access, subject.client, program)
    groups = [[subject.model(name)] for name in names(count)]
    async with writer("create", groups, [subject.kind], track.workers) as ready:
        await meter.start()
        started = time.monotonic()
        await asyncio.gather(ready.go(), track.until_children(subject.children, count))
        children = track.children_exist(subject.children, started)
        await track.until_ready(subject.kind, count, {})
        seconds = track.since(started, [subject.kind])
    await asyncio.sleep(SETTLE_SECONDS)
    return Phase(children, seconds, await meter.spent())


async def edit_models(track: Track, subject: Subject, program: Program, count: int) -> Phase:
    meter = Meter(track.access, subject.client, program)
    seen, before = track.observer.seen[subject.kind], track.generations(subject.kind)
    workloads = track.generations(subject.workload)
    groups = [[with_uid(subject.edited(subject.model(name)), seen[name])] for name in names(count)]
    async with writer("apply", groups, [subject.kind], track.workers) as ready:
        await meter.start()
        started = time.monotonic()
        await ready.go()
        await track.until_ready(subject.workload, count, workloads)
        rolled = track.since(started, [subject.workload])
        await track.until_ready(subject.kind, count, before)
        seconds = track.since(started, [subject.kind, subject.workload])  # a status may be of the old pods
    await asyncio.sleep(SETTLE_SECONDS)
    return Phase(rolled, seconds, await meter.spent())


async def delete_models(track: Track, subject: Subject, program: Program) -> Phase:
    meter = Meter(track.access, subject.client, program)
    groups = [
        [with_uid(subject.model(name), seen)] for name, seen in track.observer.seen[subject.kind].items()
    ]
    async with writer("delete", groups, [subject.kind], track.workers) as ready:
        await meter.start()
        started = time.monotonic()
        await ready.go()
        await track.until_empty()
        seconds = time.monotonic() - started
    spent = await meter.spent()
    await track.until_settled()
    return Phase(seconds, seconds, spent)


async def bare_lap(
    track: Track, subject: Subject, kinds: tuple[Kind, ...], count: int, *, edits: bool
) -> Lap:
    """The yardstick: children of `kinds` written by a loop, and the same readiness waited for.

    A Pod is not edited: it would have to be deleted and made anew, which is an outage.
    """
    meter = Meter(track.access, track.bare, None)
    template, edited = (written(rendered(model), kinds) for model in _pair(subject))
    groups = [_renamed(template, name) for name in names(count)]
    await meter.start()
    async with writer("create", groups, list(kinds), track.workers, track.bare_kubeconfig) as ready:
        started = time.monotonic()
        await asyncio.gather(ready.go(), track.until_children(kinds, count))
        children = track.children_exist(kinds, started)
        await track.until_ready(kinds[-1], count, {})
        seconds = track.since(started, kinds[-1:])
    await asyncio.sleep(SETTLE_SECONDS)
    created = Phase(children, seconds, await meter.spent())
    changed = await _edit_bare(track, edited, count) if edits and DEPLOYMENTS in kinds else None
    return Lap(count, created, changed, await _delete_bare(track, template, count))


def _pair(subject: Subject) -> tuple[Body, Body]:
    model = subject.model(names(1)[0])
    return model, subject.edited(model)


def _renamed(bodies: list[Body], name: str) -> list[Body]:
    text = json.dumps(bodies).replace(names(1)[0], name)
    made: list[Body] = json.loads(text)
    return made


def _living(track: Track, bodies: list[Body], name: str) -> list[Body]:
    by_kind = {kind.kind: seen for kind, seen in track.observer.seen.items()}
    return [
        with_uid(body, by_kind[body["kind"]][body["metadata"]["name"]]) for body in _renamed(bodies, name)
    ]


async def _edit_bare(track: Track, bodies: list[Body], count: int) -> Phase:
    deployments = [body for body in bodies if body["kind"] == DEPLOYMENTS.kind]
    before = track.generations(DEPLOYMENTS)
    groups = [_living(track, deployments, name) for name in names(count)]
    async with writer("apply", groups, [DEPLOYMENTS], track.workers, track.bare_kubeconfig) as ready:
        started = time.monotonic()
        await ready.go()
        await track.until_ready(DEPLOYMENTS, count, before)
        seconds = track.since(started, [DEPLOYMENTS])
    return Phase(seconds, seconds)


async def _delete_bare(track: Track, bodies: list[Body], count: int) -> Phase:
    groups = [_living(track, bodies, name) for name in names(count)]
    kinds = list(track.observer.seen)
    async with writer("delete", groups, kinds, track.workers, track.bare_kubeconfig) as ready:
        started = time.monotonic()
        await ready.go()
        await track.until_empty()
        seconds = time.monotonic() - started
    await track.until_settled()
    return Phase(seconds, seconds)


async def singles(track: Track, subject: Subject, samples: int) -> Singles:
    """One model after the other. Leaves none behind."""
    found = Singles()
    for name in names(samples):
        models, started = track.observer.seen[subject.kind], time.monotonic()
        await track.access.cluster.create(subject.kind, subject.model(name))
        await track.until_ready(subject.kind, 1, {})
        found.to_child.append(track.children_exist([subject.workload], started))
        pods = [seen.since for seen in track.all(PODS) if seen.ready]
        found.pod_to_model.append(max(models[name].since - max(pods), 0.0))
        found.repair.append(await _repair(track, subject.workload))
        await asyncio.sleep(SETTLE_SECONDS)
        await track.access.cluster.delete(subject.kind, ObjectKey(NAMESPACE, name), uid=models[name].uid)
        await track.until_empty()
    return found


async def _repair(track: Track, workload: Kind) -> float:
    """Of the only one there is; the new one may have another name."""
    [(child, seen)] = track.observer.seen[workload].items()
    started = time.monotonic()
    await track.access.cluster.delete(workload, ObjectKey(NAMESPACE, child), uid=seen.uid)

    def holds() -> bool:
        return any(other.uid != seen.uid for other in track.all(workload))

    await track.observer.until(holds, f"{child} is made again", LIMIT_SECONDS)
    return track.children_exist([workload], started)


async def idle(track: Track, subject: Subject, program: Program, seconds: float) -> Idle:
    meter = Meter(track.access, subject.client, program)
    await track.until_quiet(subject.kind)
    await meter.start()
    started = time.monotonic()
    await asyncio.sleep(seconds)
    spent = await meter.spent()
    return Idle(len(track.all(subject.kind)), time.monotonic() - started, spent.cpu, writes(spent.requests))


async def restart(track: Track, subject: Subject, program: Program, seconds: float) -> Restart:
    """`program` was started just now, with models in the cluster that are as they shall be."""
    meter = Meter(track.access, subject.client, None)
    await meter.start()
    ready = await program.ready()
    await asyncio.sleep(seconds)
    written = writes((await meter.spent()).requests)
    count = len(track.all(subject.kind))
    return Restart(count, ready, program.cpu_seconds(), program.memory_mb(), written)
