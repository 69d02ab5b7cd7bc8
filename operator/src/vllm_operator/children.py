"""Bringing a model's objects into the cluster: create first, apply what differs, delete what is unwanted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from vllm_operator import names
from vllm_operator.api.v1alpha1 import Metadata
from vllm_operator.compare import difference_text, differs
from vllm_operator.errors import Conflict, ForeignObject, FormerObject, Invalid, MissingApi, NotFound
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
    version_of,
)
from vllm_operator.ownership import is_booked_as_update
from vllm_operator.render import pod_template_of
from vllm_operator.world import World

log = logging.getLogger(__name__)


class Api(Protocol):
    async def get(self, kind: Kind, key: ObjectKey) -> Body: ...

    async def create(self, kind: Kind, body: Body, *, dry_run: bool = False) -> Body: ...

    async def apply(
        self, kind: Kind, body: Body, *, uid: str, subresource: str = "", dry_run: bool = False
    ) -> Body: ...

    async def book_as_apply(self, kind: Kind, key: ObjectKey, *, uid: str) -> Body: ...

    async def delete(self, kind: Kind, key: ObjectKey, *, uid: str) -> None: ...


class ModelGone(Exception):
    """The model was deleted, or made anew under its name; the tables have not heard of it yet."""


@dataclass(frozen=True)
class _Change:
    """One object to be made (`live` is None) or to be applied again."""

    kind: Kind
    wanted: Body
    live: Body | None

    @property
    def is_drift(self) -> bool:
        """Nothing that we render has changed since it was applied, so somebody else's hand did it."""
        if self.live is None:
            return False
        before = (self.live["metadata"].get("annotations") or {}).get(names.ANNOTATION_HASH)
        return bool(before == self.wanted["metadata"]["annotations"][names.ANNOTATION_HASH])


class Children:
    def __init__(self, api: Api, world: World) -> None:
        self._api, self._world = api, world

    async def bring(
        self, owner: Metadata, manifests: Iterable[Body], kept: Iterable[Body] = (), *, alive: bool = False
    ) -> tuple[str, ...]:
        """Returns what was repaired of others' edits, a text for each object. `kept` is left as it is, and
        `alive` says that the model was there a moment ago.

        Raises ForeignObject, FormerObject, MissingApi, ModelGone, or the ApiError of the first object that is
        refused; then nothing that exists has been touched.
        """
        wanted = list(manifests)
        changes = self._changes(owner, wanted)
        if not alive and any(change.live is None for change in changes):
            await self.ensure_alive(owner)
        await self._ask_first(changes)
        repaired = [text for change in changes if (text := await self._bring_one(owner, change))]
        await self._prune(owner, {(child_kind(body), key_of(body)) for body in (*wanted, *kept)})
        return tuple(repaired)

    def _changes(self, owner: Metadata, wanted: Iterable[Body]) -> list[_Change]:
        found = []
        for body in wanted:
            kind = child_kind(body)
            live = self._world.child(kind, key_of(body))
            if live is not None:
                self._check_owner(owner, kind, live)
            if live is None or differs(changeable(kind, body), live):
                found.append(_Change(kind, body, live))
        return found

    async def _ask_first(self, changes: list[_Change]) -> None:
        """A refusal of one object must find the others untouched: all but the first are tried without effect.

        The first write is its own trial, and an apply is atomic; so an edit that changes one object alone
        costs nothing more. Nor does a new model, of which nothing runs yet.
        """
        if all(change.live is None for change in changes):
            return
        for change in changes[1:]:
            try:
                await self._try(change)
            except Invalid as error:
                # An admission webhook with side effects takes no trials: then the write itself will tell.
                if "does not support dry run" not in error.message:
                    raise

    async def _try(self, change: _Change) -> None:
        if change.live is not None:
            sent = changeable(change.kind, change.wanted)
            await self._api.apply(change.kind, sent, uid=uid_of(change.live), dry_run=True)
            return
        try:
            await self._api.create(change.kind, change.wanted, dry_run=True)
        except Conflict:
            return  # whose it is, is looked at when it is made
        except NotFound as error:
            if change.kind.optional:
                raise MissingApi(change.kind.kind) from error
            raise

    async def ensure_engine_key(
        self, owner: Metadata, secret: Body, workload: Body | None, *, alive: bool = False
    ) -> bool:
        """Makes the Secret where nothing says that it is there: the operator may create Secrets, but not read
        any. It is there if the live workload refers to it and no pod misses it.

        Returns whether the model had to be looked at, and is there.
        """
        name = key_of(secret).name
        pods = self._world.pods(owner.key, owner.uid)
        if workload is not None and refers_to(workload, name) and not any(misses(pod, name) for pod in pods):
            return False
        if not alive:
            await self.ensure_alive(owner)
        with contextlib.suppress(Conflict):
            await self._api.create(SECRETS, secret)
            log.info("created", extra={"model": str(owner.key), "kind": SECRETS.kind})
        return True

    async def ensure_alive(self, owner: Metadata) -> None:
        """A child of a model that is gone would be collected and, seen to vanish, made again for ever."""
        try:
            live = await self._api.get(MODELS, ObjectKey(*owner.key))
        except NotFound as error:
            raise ModelGone(owner.key) from error
        if uid_of(live) != owner.uid or "deletionTimestamp" in live["metadata"]:
            raise ModelGone(owner.key)

    async def _bring_one(self, owner: Metadata, change: _Change) -> str:
        """What was repaired; empty for a change of ours, and for one that changed nothing."""
        kind, wanted = change.kind, change.wanted
        live = change.live or await self._create(owner, kind, wanted)
        self._check_owner(owner, kind, live)
        wanted = changeable(kind, wanted)
        if not differs(wanted, live):
            return ""
        if not kind.fixed and is_booked_as_update(live):
            booked = await self._api.book_as_apply(kind, key_of(live), uid=uid_of(live))
            live = {**live, "metadata": {**live["metadata"], "resourceVersion": str(version_of(booked))}}
        applied = await self._api.apply(kind, wanted, uid=uid_of(live))
        self._world.note(kind, applied)
        log.info("applied", extra={"model": str(owner.key), "kind": kind.kind})
        if not change.is_drift or version_of(applied) == version_of(live):
            return ""
        return f"{kind.kind} {key_of(live).name}: {difference_text(wanted, live)}"

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
        if any(item.get("kind") == names.KIND and item.get("name") == owner.name for item in owners):
            raise FormerObject(kind.kind, key_of(live).name, live["metadata"].get("finalizers") or ())
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
