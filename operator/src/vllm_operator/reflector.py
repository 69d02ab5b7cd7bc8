"""A table of one kind's objects that follows the cluster: list, then watch, and list again after any trouble.

The client's own Watch gives up on a second 410. Here only a complete list replaces the table, and what
vanished between two lists is told like a deletion, so a missed event heals.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from vllm_operator.backoff import Backoff
from vllm_operator.clock import Clock
from vllm_operator.cluster import Listing, WatchEvent
from vllm_operator.errors import ApiError, Forbidden, Gone
from vllm_operator.kinds import Body, Kind, ObjectKey, key_of, uid_of, version_of

log = logging.getLogger(__name__)

Change = Callable[[Body | None, Body | None], None]
OPTIONAL_RETRY_SECONDS = 600.0
PAUSE_SECONDS = 0.2  # between two watches, so that a server that ends them at once is not flooded


class Source(Protocol):
    async def list(
        self,
        kind: Kind,
        namespace: str = "",
        selector: str = "",
        fields: str = "",
        *,
        keep: Callable[[Body], Body],
    ) -> Listing: ...

    def watch(
        self, kind: Kind, namespace: str, selector: str, since: str, fields: str = ""
    ) -> AsyncIterator[WatchEvent]: ...


class Reflector:
    """Tells `on_change(old, new)` of every difference, in order; `project` says what is kept of an object.

    `optional`: the operator works without it, so that a missing right is no trouble.
    """

    def __init__(
        self,
        source: Source,
        kind: Kind,
        clock: Clock,
        on_change: Change,
        *,
        namespace: str = "",
        selector: str = "",
        fields: str = "",
        project: Callable[[Body], Body] = lambda body: body,
        backoff: Backoff | None = None,
        optional: bool = False,
    ) -> None:
        self.kind = kind
        self.table: dict[ObjectKey, Body] = {}
        self.synced = asyncio.Event()
        self.last_activity = clock.monotonic()  # of an event, a list or a failed attempt: the loop turns
        self._source, self._clock, self._on_change, self._project = source, clock, on_change, project
        self._scope = (namespace, selector)
        self._fields = fields
        self._backoff = backoff or Backoff(first=0.5, cap=30)
        self._optional, self._told = optional, False
        self._failures = 0
        self._deleted: deque[str] = deque(maxlen=1000)  # uids

    async def run(self) -> None:
        """Never returns: whatever fails is tried again."""
        while True:
            try:
                await self._follow()
            except Gone:
                log.info("watch expired, listing again", extra={"kind": self.kind.kind})
                await self._clock.sleep(PAUSE_SECONDS)
            except Forbidden as error:
                await self._without_right(error)
            except ApiError as error:
                self._failures += 1
                self.last_activity = self._clock.monotonic()
                facts = {"kind": self.kind.kind, "code": error.code, "error": error.message}
                log.warning("watch failed", extra=facts)
                await self._clock.sleep(self._backoff.after(self._failures))

    async def _without_right(self, error: Forbidden) -> None:
        """Told once, and asked for again at growing intervals, longer where it is optional.

        At first soon, since an API server that has just come back refuses until it has read the roles.
        """
        if not self._told:
            log.warning("no right to watch", extra={"kind": self.kind.kind, "error": error.message})
        self._told = True
        self.last_activity = self._clock.monotonic()
        self._failures += 1
        cap = OPTIONAL_RETRY_SECONDS if self._optional else self._backoff.cap
        await self._clock.sleep(dataclasses.replace(self._backoff, cap=cap).after(self._failures))

    def note(self, body: Body) -> None:
        """Puts in what a write of ours answered, so that its echo is no change.

        The answer can come after the watch has told of the object's deletion already.
        """
        if uid_of(body) not in self._deleted:
            self._put(self._project(body))

    async def _follow(self) -> None:
        listing = await self._source.list(self.kind, *self._scope, self._fields, keep=self._project)
        self._replace(listing.items)
        self.synced.set()
        self.last_activity = self._clock.monotonic()
        version = listing.version
        while True:
            async for event in self._source.watch(self.kind, *self._scope, version, self._fields):
                self.last_activity = self._clock.monotonic()
                self._failures, self._told = 0, False
                version = event.body["metadata"].get("resourceVersion", version)
                self._take(event)
            await self._clock.sleep(PAUSE_SECONDS)

    def _take(self, event: WatchEvent) -> None:
        if event.type == "DELETED":
            self._drop(key_of(event.body))
        elif event.type in ("ADDED", "MODIFIED"):
            self._put(self._project(event.body))

    def _put(self, body: Body) -> None:
        key = key_of(body)
        old = self.table.get(key)
        if old is not None and uid_of(old) == uid_of(body) and version_of(old) >= version_of(body):
            return
        self.table[key] = body
        self._on_change(old, body)

    def _drop(self, key: ObjectKey) -> None:
        if (old := self.table.pop(key, None)) is not None:
            self._deleted.append(uid_of(old))
            self._on_change(old, None)

    def _replace(self, items: list[Body]) -> None:
        fresh = {key_of(body): body for body in items}
        for key in [key for key in self.table if key not in fresh]:
            self._drop(key)
        for body in fresh.values():
            self._put(body)
