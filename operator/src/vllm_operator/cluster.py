"""The API server, by the official client's transport: credentials, TLS and connections are its business.

Only requests on static paths, JSON in and out; every failure is one of `errors`. Writing is create-first,
then server-side apply with the field manager `vllm-operator`.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from vllm_operator import names
from vllm_operator.errors import (
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    SettingsError,
    Unavailable,
    clip,
)
from vllm_operator.kinds import Body, Kind, ObjectKey, key_of, without_managed_fields
from vllm_operator.ownership import booked_as_apply

PAGE_SIZE = 100  # parsed, a page takes some ten times its bytes of memory, until the next one is asked for
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
# The server sends a bookmark at least every minute; a watch that is silent for longer is dead.
WATCH_SILENCE_SECONDS = 90
WATCH_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=WATCH_SILENCE_SECONDS)
# Without bookmarks silence says nothing. So such a watch is ended by the server itself, and begun anew.
UNMARKED_SECONDS = 540
UNMARKED_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=UNMARKED_SECONDS + 60)
MAX_CONNECTIONS = 100

_APPLY = "application/apply-patch+yaml"
_JSON = "application/json"
_MERGE = "application/merge-patch+json"
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_BY_CODE: dict[int, type[ApiError]] = {
    400: Invalid,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: Invalid,
    422: Invalid,
    429: Unavailable,
}


async def connect() -> ApiClient:
    """The pod's service account, or outside of a cluster what KUBECONFIG names. The caller closes it.

    Raises SettingsError where neither is to be had.
    """
    configuration = Configuration()
    try:
        await _load(configuration)
    except kube_config.ConfigException as error:
        raise SettingsError(f"no cluster to work for: {error}. Run in a pod, or set KUBECONFIG") from error
    configuration.connection_pool_maxsize = MAX_CONNECTIONS
    configuration.proxy = configuration.proxy or _proxy_to(configuration.host)
    # The session's own way to a proxy (trust_env) also reads ~/.netrc, in a thread, for every request.
    configuration.client_session_kwargs = {"trust_env": False, "cookie_jar": aiohttp.DummyCookieJar()}
    return ApiClient(configuration)


def _proxy_to(host: str) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say of the API server."""
    url = urlsplit(host)
    if urllib.request.proxy_bypass(url.netloc):
        return None
    return urllib.request.getproxies().get(url.scheme)


async def _load(configuration: Configuration) -> None:
    if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
        kube_config.load_incluster_config(client_configuration=configuration)
    else:
        # Named here because the client reads the variable only when it is imported.
        await kube_config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)


@dataclass(frozen=True)
class Listing:
    """A complete list, and the version from which a watch goes on."""

    items: list[Body]
    version: str


@dataclass(frozen=True)
class WatchEvent:
    """`type` is ADDED, MODIFIED, DELETED or BOOKMARK."""

    type: str
    body: Body


class Cluster:
    """Every method raises an ApiError. `count_error` hears of each, by code, for the metrics.

    It does not hear of an optional API that is absent: to ask for it is how one finds out.
    """

    def __init__(self, client: ApiClient, count_error: Callable[[int], None] = lambda _code: None) -> None:
        self._client = client
        self._count_error = count_error

    async def get(self, kind: Kind, key: ObjectKey) -> Body:
        return await self._request("GET", kind.path(*key))

    async def create(self, kind: Kind, body: Body, *, dry_run: bool = False) -> Body:
        """Conflict where the name is taken. A dry run is judged by all of the server and stores nothing."""
        path = kind.path(key_of(body).namespace)
        query = {"fieldManager": names.FIELD_MANAGER} | _dry(dry_run)
        return await self._request("POST", path, query, body)

    async def apply(
        self, kind: Kind, body: Body, *, uid: str, subresource: str = "", dry_run: bool = False
    ) -> Body:
        """Server-side apply to the object with this uid; Conflict where it is gone or another."""
        metadata = {**body["metadata"], "uid": uid}
        path = kind.path(*key_of(body), subresource)
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"} | _dry(dry_run)
        return await self._request("PATCH", path, query, {**body, "metadata": metadata}, _APPLY)

    async def book_as_apply(self, kind: Kind, key: ObjectKey, *, uid: str) -> Body:
        """Makes what we created ours for server-side apply: see ownership. Conflict where it has changed."""
        meta = (await self.get(kind, key))["metadata"]
        owned = booked_as_apply(meta.get("managedFields") or [])
        body = {"metadata": {"uid": uid, "resourceVersion": meta["resourceVersion"], "managedFields": owned}}
        return await self._request("PATCH", kind.path(*key), {}, body, _MERGE)

    async def replace(self, kind: Kind, body: Body) -> Body:
        """Conflict where the object has changed since it was read."""
        return await self._request("PUT", kind.path(*key_of(body)), {}, body)

    async def delete(self, kind: Kind, key: ObjectKey, *, uid: str) -> None:
        """In the background: dependents go after it. Absent is as good as deleted."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        with contextlib.suppress(NotFound):
            await self._request("DELETE", kind.path(*key), {}, body)

    async def list(
        self,
        kind: Kind,
        namespace: str = "",
        selector: str = "",
        fields: str = "",
        *,
        keep: Callable[[Body], Body] = without_managed_fields,
    ) -> Listing:
        """All pages of one consistent list, narrowed by selectors of labels and fields.

        `keep` makes of each object what is kept of it.
        """
        items: list[Body] = []
        query = {"limit": str(PAGE_SIZE)} | _selectors(selector, fields)
        accept = _METADATA_LIST if kind.metadata_only else _JSON
        while True:
            page = await self._request(
                "GET", kind.path(namespace), query, accept=accept, absent=kind.optional
            )
            said_once = {"apiVersion": kind.api_version, "kind": kind.kind}
            found = page["items"] or ()  # null for none, in a list of metadata
            items += [keep({**item, **said_once}) for item in found]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return Listing(items, page["metadata"]["resourceVersion"])

    async def watch(
        self, kind: Kind, namespace: str, selector: str, since: str, fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Changes after `since` until the server ends the stream. Gone where it remembers no further back."""
        query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": since}
        query |= _selectors(selector, fields)
        limits = WATCH_TIMEOUT
        if not kind.bookmarks:
            query["timeoutSeconds"], limits = str(UNMARKED_SECONDS), UNMARKED_TIMEOUT
        accept = _METADATA if kind.metadata_only else _JSON
        response = await self._send("GET", kind.path(namespace), query, None, limits, accept=accept)
        try:
            async with _reachable():
                async for line in response.content:
                    yield self._event(json.loads(line))
        finally:
            response.close()

    def _event(self, raw: dict[str, Any]) -> WatchEvent:
        if raw["type"] == "ERROR":
            status = raw["object"]
            code = int(status.get("code") or 500)
            self._count_error(code)
            raise _error(code, status, None)
        return WatchEvent(raw["type"], raw["object"])

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content: str = _JSON,
        accept: str = _JSON,
        absent: bool = False,
    ) -> Body:
        """`absent`: a 404 is no failure to count."""
        response = await self._send(
            method, path, query or {}, body, REQUEST_TIMEOUT, content, accept, absent=absent
        )
        async with _reachable():
            answer: Body = json.loads(await response.read())
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Any,
        limits: aiohttp.ClientTimeout,
        content: str = _JSON,
        accept: str = _JSON,
        *,
        absent: bool = False,
    ) -> aiohttp.ClientResponse:
        """A response with a status below 400; its body is not read yet."""
        headers = {"Accept": accept, "Content-Type": content}
        async with _reachable(self._count_error):
            prepared = await self._client.param_serialize(
                method, path, {}, list(query.items()), headers, body, auth_settings=["BearerToken"]
            )
            sent = await self._client.call_api(*prepared, _request_timeout=limits)
            response: aiohttp.ClientResponse = sent.response
            if response.status < 400:
                return response
            raw = await response.read()
        if not (absent and response.status == 404):
            self._count_error(response.status)
        raise _error(response.status, _status_of(raw), response.headers.get("Retry-After"))


def _error(code: int, status: dict[str, Any], retry_after: str | None) -> ApiError:
    kind = _BY_CODE.get(code, Unavailable if code >= 500 or code == 401 else ApiError)
    wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
    return kind(code, str(status.get("reason", "")), str(status.get("message", f"HTTP {code}")), wait)


def _selectors(labels: str, fields: str) -> dict[str, str]:
    asked = {"labelSelector": labels, "fieldSelector": fields}
    return {name: value for name, value in asked.items() if value}


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _status_of(raw: bytes) -> dict[str, Any]:
    """A metav1.Status, or what a proxy in between wrote, clipped."""
    try:
        status = json.loads(raw)
    except ValueError:
        return {"message": clip(raw.decode(errors="replace"), 256)}
    return status if isinstance(status, dict) else {}


@contextlib.asynccontextmanager
async def _reachable(count_error: Callable[[int], None] = lambda _code: None) -> AsyncIterator[None]:
    """Turns what the transport raises into Unavailable.

    A TimeoutError is an OSError. HttpProcessingError is aiohttp's for an event of a watch that is longer than
    its buffer: a large object, which anybody may make, must not end the operator.
    """
    try:
        yield
    except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
        count_error(0)
        what = clip(str(error) or type(error).__name__, 256)
        raise Unavailable(0, "Unreachable", f"the API server cannot be reached: {what}") from error
