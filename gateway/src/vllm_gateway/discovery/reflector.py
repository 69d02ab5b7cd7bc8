"""Mirrors one kind of object of a Kubernetes API: list, then watch, for ever.

Only a complete list replaces the mirror, so a deletion that was missed heals at the next one; an API that
is down changes nothing. The client's own `Watch` gives up on a second 410, so the loop is here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

_LOG = logging.getLogger("vllm_gateway.discovery")
_PAGE = "500"
_FIRST_BACKOFF = 0.2
_MAX_BACKOFF = 30.0
# Asking a server that is away costs it nothing, and its return, with all that changed, is to be noticed soon.
_MAX_BACKOFF_WHILE_AWAY = 5.0

Json = dict[str, Any]
Key = tuple[str, str]


class ApiError(Exception):
    """The API's refusal, or that it did not answer (`code` 0)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Api(Protocol):
    """Reads of a Kubernetes API. Both raise ApiError."""

    async def get(self, path: str, query: Mapping[str, str]) -> Json: ...

    def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        """The events of a watch until the server ends it; raises ApiError where it falls silent."""
        ...


class Reflector:
    """`items` are the objects at `path` by (namespace, name).

    `synced` once there was a complete list; `problem` says what is wrong now; `heard_at` (monotonic) is
    when the API last said anything.
    """

    def __init__(
        self, api: Api, path: str, changed: Callable[[], None], *, query: Mapping[str, str] | None = None
    ) -> None:
        self._api = api
        self.path = path
        self._changed = changed
        self._query = dict(query or {})
        self._backoff = _FIRST_BACKOFF
        self._version = ""
        self.items: dict[Key, Json] = {}
        self.synced = False
        self.problem = ""
        self.heard_at = time.monotonic()

    async def run(self) -> None:
        """Never returns; every error is a reason to list again, a little later."""
        while True:
            try:
                await self._list()
                while True:
                    await self._watch()
                    await asyncio.sleep(_FIRST_BACKOFF)  # a server that ends each at once is not hammered
            except ApiError as error:
                if error.code != 410:  # expired: ordinary, and only the list helps
                    self._report(error)
                if error.code == 0:
                    self._backoff = min(_MAX_BACKOFF_WHILE_AWAY, self._backoff)
            except Exception as error:  # noqa: BLE001 - a mirror that ends would be believed for ever
                _LOG.exception("cannot watch", extra={"fields": {"path": self.path}})
                self._tell(f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            self._backoff = min(_MAX_BACKOFF, self._backoff * 2)

    async def _list(self) -> None:
        items: dict[Key, Json] = {}
        query = self._query | {"limit": _PAGE}
        while True:
            page = await self._api.get(self.path, query)
            if "items" not in page:  # what is no list must not empty the table
                raise ApiError(0, f"the Kubernetes API answers no list to GET {self.path}")
            items |= {_key(item): item for item in page["items"] or ()}
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        self._version = str(metadata.get("resourceVersion", ""))
        self.items = items
        self.synced = True
        self._alive()
        self._changed()

    async def _watch(self) -> None:
        query = self._query | {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(240, 300)),  # noqa: S311 - gateways must not come in step
        }
        async for event in self._api.watch(self.path, query):
            self._take(event)
        self._alive()

    def _take(self, event: Json) -> None:
        kind, body = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            raise ApiError(int(body.get("code") or 500), str(body.get("message", "the watch failed")))
        self._version = str((body.get("metadata") or {}).get("resourceVersion") or self._version)
        self._backoff = _FIRST_BACKOFF  # not after a list: were only watches refused, each would list again
        self._alive()
        if kind in ("ADDED", "MODIFIED"):
            self.items[_key(body)] = body
        elif kind == "DELETED":
            self.items.pop(_key(body), None)
        else:  # a bookmark
            return
        self._changed()

    def _alive(self) -> None:
        self.heard_at = time.monotonic()
        if self.problem:
            self.problem = ""
            self._changed()

    def _report(self, error: ApiError) -> None:
        _LOG.warning(
            "cannot watch",
            extra={"fields": {"path": self.path, "code": error.code, "error": error.message}},
        )
        self._tell(error.message)

    def _tell(self, problem: str) -> None:
        if self.problem != problem:
            self.problem = problem
            self._changed()


def _key(body: Json) -> Key:
    metadata = body.get("metadata") or {}
    return str(metadata.get("namespace", "")), str(metadata.get("name", ""))
