"""Bringing a model's objects into the cluster: create first, apply what differs, delete what is unwanted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Protocol

from vllm_operator.api.v1alpha1 import Metadata
from vllm_operator.compare import differs
from vllm_operator.errors import Conflict, ForeignObject, MissingApi, NotFound
from vllm_operator.kinds import (
    MODELS,
    SECRETS,
    Body,
    Kind,
    ObjectKey,
    changeable,
    child_kind,
    is_controlled_by,
    key_of,
    uid_of,
)
from vllm_operator.names import KIND
from vllm_operator.ownership import is_booked_as_update
from vllm_operator.render import pod_template_of
from vllm_operator.world import World

log = logging.getLogger(__name__)


class Api(Protocol):
    async def get(self, kind: Kind, key: ObjectKey) -> Body: ...

    async def create(self, kind: Kind, body: Body) -> Body: ...

    async def apply(self, kind: Kind, body: Body, *, uid: str, subresource: str = "") -> Body: ...

    async def book_as_apply(self, kind: Kind, key: ObjectKey, *, uid: str) -> Body: ...

    async def delete(self, kind: Kind, key: ObjectKey, *, uid: str) -> None: ...


class ModelGone(Exception):
    """The model was deleted, or made anew under its name; the tables have not heard of it yet."""


class Children:
    def __init__(self, api: Api, world: World) -> None:
        self._api, self._world = api, world

    async def bring(self, owner: Metadata, manifests: Iterable[Body], kept: Iterable[Body] = ()) -> None:
        """What is in `kept` stays as it is, or absent.

        Raises ForeignObject, MissingApi, ModelGone, or the ApiError of the first object that is refused.
        """
        wanted = list(manifests)
        if any(self._world.child(child_kind(body), key_of(body)) is None for body in wanted):
            await self._ensure_alive(owner)
        for body in wanted:
            await self._bring_one(owner, child_kind(body), body)
        await self._prune(owner, {(child_kind(body), key_of(body)) for body in (*wanted, *kept)})

    async def ensure_engine_key(self, owner: Metadata, secret: Body, workload: Body | None) -> None:
        """Makes the Secret where nothing says that it is there: the operator may create Secrets, but not read
        any. It is there if the live workload refers to it and no pod misses it.
        """
        name = key_of(secret).name
        pods = self._world.pods(owner.key, owner.uid)
        if workload is not None and refers_to(workload, name) and not any(misses(pod, name) for pod in pods):
            return
        await self._ensure_alive(owner)
        with contextlib.suppress(Conflict):
            await self._api.create(SECRETS, secret)
            log.info("created", extra={"model": str(owner.key), "kind": SECRETS.kind})

    async def _ensure_alive(self, owner: Metadata) -> None:
        """A child of a model that is gone would be collected and, seen to vanish, made again for ever."""
        try:
            live = await self._api.get(MODELS, ObjectKey(*owner.key))
        except NotFound as error:
            raise ModelGone(owner.key) from error
        if uid_of(live) != owner.uid or "deletionTimestamp" in live["metadata"]:
            raise ModelGone(owner.key)

    async def _bring_one(self, owner: Metadata, kind: Kind, wanted: Body) -> None:
        live = self._world.child(kind, key_of(wanted)) or await self._create(owner, kind, wanted)
        self._check_owner(owner, kind, live)
        wanted = changeable(kind, wanted)
        if differs(wanted, live):
            if not kind.fixed and is_booked_as_update(live):
                await self._api.book_as_apply(kind, key_of(live), uid=uid_of(live))
            self._world.note(kind, await self._api.apply(kind, wanted, uid=uid_of(live)))
            log.info("applied", extra={"model": str(owner.key), "kind": kind.kind})

    async def _create(self, owner: Metadata, kind: Kind, wanted: Body) -> Body:
        """The created object, or the one that has the name already."""
        try:
            made = await self._api.create(kind, wanted)
        except Conflict:
            return await self._api.get(kind, key_of(wanted))
        except NotFound as error:
            if kind.optional:
                raise MissingApi(kind.kind) from error
            raise
        self._world.note(kind, made)
        log.info("created", extra={"model": str(owner.key), "kind": kind.kind})
        return made

    def _check_owner(self, owner: Metadata, kind: Kind, live: Body) -> None:
        if is_controlled_by(live, owner.uid):
            return
        owners = live["metadata"].get("ownerReferences") or ()
        if any(item.get("kind") == KIND and item.get("name") == owner.name for item in owners):
            message = f"the {kind.kind} of the model that had this name before is being deleted"
            raise Conflict(409, "Conflict", message)
        raise ForeignObject(kind.kind, key_of(live).name)

    async def _prune(self, owner: Metadata, wanted: set[tuple[Kind, ObjectKey]]) -> None:
        for kind, body in self._world.owned_children(owner.key, owner.uid):
            if (
                not kind.kept
                and (kind, key_of(body)) not in wanted
                and "deletionTimestamp" not in body["metadata"]
            ):
                await self._api.delete(kind, key_of(body), uid=uid_of(body))
                log.info("deleted", extra={"model": str(owner.key), "kind": kind.kind})


def refers_to(workload: Body, secret: str) -> bool:
    containers = pod_template_of(workload)["spec"]["containers"]
    references = [
        item.get("valueFrom", {}).get("secretKeyRef", {})
        for each in containers
        for item in each.get("env") or ()
    ]
    return any(reference.get("name") == secret for reference in references)


def misses(pod: Body, secret: str) -> bool:
    """Whether the kubelet says that the Secret is not there."""
    states = [item.get("state") or {} for item in (pod.get("status") or {}).get("containerStatuses") or ()]
    said = [(state.get("waiting") or {}).get("message") or "" for state in states]
    return any(f'"{secret}" not found' in message for message in said)
