"""A small Kubernetes API server over a real socket, for the operator's and the gateway's component tests.

    async with KubeApi() as api:
        api.url                                    # http://127.0.0.1:<port>
        api.write_kubeconfig(tmp_path / "config")  # for any client that reads one
        api.create(VLLM_MODELS, "ns", body)        # act as another user, in-process;
        api.get, api.objects, api.patch, api.patch_status, api.delete     # ... and these
        api.requests                               # what clients sent; api.writes() leaves the reads out
        api.fault("POST", "/deployments", 403, message="exceeded quota")  # scripted answers, `times` of them
        api.end_watches(); api.end_watches(code=500)  # close all streams, or end them with an ERROR event
        api.compact()                              # older resourceVersions are 410 from now on
        await api.stop_listening(); await api.start_listening()  # refused connections, until it is back

It serves discovery, list (labelSelector, fieldSelector, limit/continue), watch (resourceVersion, bookmarks,
timeoutSeconds, 410), both also as PartialObjectMetadata, create, get, replace, merge patch, server-side
apply, dry runs, the status subresource and delete with garbage collection. Object semantics are in
kube_store. No auth, no TLS.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from aiohttp import web
from kube_select import partial_metadata, selected
from kube_store import RESOURCES, VLLM_MODELS, Change, Json, Refused, Resource, Store
from own_port import OwnPort

__all__ = ["RESOURCES", "VLLM_MODELS", "Fault", "Json", "KubeApi", "Request", "Resource", "resource"]


def resource(plural: str) -> Resource:
    return next(item for item in RESOURCES if item.plural == plural)


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    content_type: str
    body: Any


@dataclasses.dataclass
class Fault:
    """Answers the next `times` requests whose method is `method` and whose path contains `path`."""

    method: str
    path: str
    code: int
    reason: str
    message: str
    times: int = 1
    retry_after: int | None = None
    hang: float = 0.0  # seconds before the answer

    def matches(self, request: web.Request) -> bool:
        return self.times > 0 and self.method == request.method and self.path in request.path


@dataclasses.dataclass(frozen=True)
class Target:
    """What a URL path points at."""

    resource: Resource
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> tuple[str, str]:
        return (self.namespace if self.resource.namespaced else "", self.name)


class KubeApi:
    """See the module's docstring. `bookmark_seconds`: silence on a watch after which a bookmark is sent."""

    def __init__(self, *, bookmark_seconds: float = 0.2) -> None:
        self.store = Store()
        self.requests: list[Request] = []
        self.bookmark_seconds = bookmark_seconds
        self._faults: list[Fault] = []
        self._watches: set[asyncio.Queue[Change | int]] = set()
        self._runner: web.AppRunner | None = None
        self._port = OwnPort()
        self.store.listeners.append(self._broadcast)

    # Life

    async def __aenter__(self) -> Self:
        await self.start_listening()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_listening()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port.number}"

    async def start_listening(self) -> None:
        """Listens, or does so again on the port it had."""
        app = web.Application(client_max_size=8 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port.number, reuse_address=True)
        await site.start()

    async def stop_listening(self) -> None:
        self.end_watches()
        if self._runner:
            await self._runner.cleanup()

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._watches)

    def write_kubeconfig(self, path: Path) -> Path:
        named = {"name": "fake"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [named | {"cluster": {"server": self.url}}],
            "users": [named | {"user": {"token": "t0ken"}}],
            "contexts": [named | {"context": {"cluster": "fake", "user": "fake"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # Acting as somebody else

    def create(self, kind: Resource, namespace: str, body: Json) -> Json:
        """Unlike over HTTP, a status in `body` is kept."""
        made = self.store.create(kind, namespace, body)
        if kind.has_status and "status" in body:
            return self.patch_status(kind, namespace, made["metadata"]["name"], body["status"])
        return made

    def get(self, kind: Resource, namespace: str, name: str) -> Json:
        return self.store.get(kind, (namespace, name))

    def objects(self, kind: Resource, namespace: str = "") -> list[Json]:
        return self.store.objects(kind, namespace)

    def patch(self, kind: Resource, namespace: str, name: str, patch: Json) -> Json:
        return self.store.merge(kind, (namespace, name), patch, status=False)

    def patch_status(self, kind: Resource, namespace: str, name: str, status: Json) -> Json:
        return self.store.merge(kind, (namespace, name), {"status": status}, status=True)

    def delete(self, kind: Resource, namespace: str, name: str) -> Json:
        return self.store.delete(kind, (namespace, name))

    # Faults

    def fault(
        self,
        method: str,
        path: str,
        code: int,
        *,
        reason: str = "",
        message: str = "scripted",
        times: int = 1,
        retry_after: int | None = None,
        hang: float = 0.0,
    ) -> Fault:
        """Scripts a failure. The oldest match is used first; `times = 0` on the result ends it."""
        made = Fault(method, path, code, reason or _REASONS.get(code, ""), message, times, retry_after, hang)
        self._faults.append(made)
        return made

    def end_watches(self, *, code: int = 0) -> None:
        """Closes every open watch; with a code, an ERROR event goes out first."""
        for queue in list(self._watches):
            queue.put_nowait(code)

    def compact(self) -> None:
        self.store.compact()

    def writes(self) -> list[Request]:
        return [request for request in self.requests if request.method != "GET"]

    # Serving

    def _broadcast(self, change: Change) -> None:
        for queue in self._watches:
            queue.put_nowait(change)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        raw = await request.text()
        body = json.loads(raw) if raw else None
        query = dict(request.query)
        self.requests.append(Request(request.method, request.path, query, request.content_type, body))
        try:
            await self._fail_if_scripted(request)
            if (found := _discovery(request.path)) is not None:
                return web.json_response(found)
            target = _target(request.path)
            partial = "as=PartialObjectMetadata" in request.headers.get("Accept", "")
            if request.method == "GET" and not target.name and query.get("watch") in ("1", "true"):
                return await self._watch(request, target, query, partial=partial)
            code, answer = self._handlers()[request.method](target, query, request.content_type, body)
            return web.json_response(partial_metadata(answer) if partial else answer, status=code)
        except Refused as refused:
            return _refusal(refused)

    async def _fail_if_scripted(self, request: web.Request) -> None:
        fault = next((fault for fault in self._faults if fault.matches(request)), None)
        if fault is None:
            return
        fault.times -= 1
        await asyncio.sleep(fault.hang)
        raise Refused(fault.code, fault.reason, fault.message, fault.retry_after)

    def _handlers(self) -> dict[str, Callable[[Target, dict[str, str], str, Any], tuple[int, Json]]]:
        return {
            "GET": self._get,
            "POST": self._post,
            "PUT": self._put,
            "PATCH": self._patch,
            "DELETE": self._delete,
        }

    def _get(self, target: Target, query: dict[str, str], _type: str, _body: Any) -> tuple[int, Json]:
        if target.name:
            return 200, self.store.get(target.resource, target.key)
        items = [
            body
            for body in self.store.objects(target.resource, target.namespace)
            if selected(body, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        ]
        start = int(query.get("continue") or 0)
        end = start + int(query.get("limit") or 0) if query.get("limit", "0") != "0" else len(items)
        meta: Json = {"resourceVersion": str(self.store.version)}
        if end < len(items):
            meta |= {"continue": str(end), "remainingItemCount": len(items) - end}
        kind = f"{target.resource.kind}List"
        return 200, {
            "apiVersion": target.resource.path,
            "kind": kind,
            "metadata": meta,
            "items": items[start:end],
        }

    def _post(self, target: Target, query: dict[str, str], _type: str, body: Any) -> tuple[int, Json]:
        dry_run = query.get("dryRun") == "All"
        manager = query.get("fieldManager", "")
        made = self.store.create(target.resource, target.namespace, body, manager=manager, dry_run=dry_run)
        return 201, made

    def _put(self, target: Target, query: dict[str, str], _type: str, body: Any) -> tuple[int, Json]:
        dry_run = query.get("dryRun") == "All"
        status = _is_status(target)
        return 200, self.store.replace(target.resource, target.key, body, status=status, dry_run=dry_run)

    def _patch(self, target: Target, query: dict[str, str], content_type: str, body: Any) -> tuple[int, Json]:
        status, dry_run = _is_status(target), query.get("dryRun") == "All"
        if content_type == "application/merge-patch+json" and "managedFields" in body.get("metadata", {}):
            return 200, self.store.book(target.resource, target.key, body["metadata"])
        if content_type == "application/merge-patch+json":
            return 200, self.store.merge(target.resource, target.key, body, status=status, dry_run=dry_run)
        if content_type != "application/apply-patch+yaml":
            raise Refused(415, "UnsupportedMediaType", f"this fake has no {content_type}")
        manager = query.get("fieldManager")
        if not manager:
            raise Refused(422, "Invalid", "fieldManager: Required value: is required for apply patch")
        if query.get("force") not in ("1", "true"):
            raise Refused(501, "NotImplemented", "this fake has no apply without force")
        if "managedFields" in body.get("metadata", {}):
            raise Refused(400, "BadRequest", "metadata.managedFields must be nil")
        answer, created = self.store.apply(
            target.resource, target.key, body, manager, status=status, dry_run=dry_run
        )
        return (201 if created else 200), answer

    def _delete(self, target: Target, _query: dict[str, str], _type: str, body: Any) -> tuple[int, Json]:
        uid = ((body or {}).get("preconditions") or {}).get("uid")
        return 200, self.store.delete(target.resource, target.key, uid=uid)

    # Watching

    async def _watch(
        self, request: web.Request, target: Target, query: dict[str, str], *, partial: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        queue: asyncio.Queue[Change | int] = asyncio.Queue()
        since = int(query.get("resourceVersion") or 0)
        if 0 < since < self.store.compacted:
            queue.put_nowait(410)
        elif since:
            for change in self.store.history:
                if change.version > since:
                    queue.put_nowait(change)
        existing = [] if since else self.store.objects(target.resource, target.namespace)
        self._watches.add(queue)
        try:
            await response.prepare(request)
            for body in existing:
                if selected(body, query.get("labelSelector", ""), query.get("fieldSelector", "")):
                    await _send(response, "ADDED", partial_metadata(body) if partial else body)
            await self._stream(response, queue, target, query, partial=partial)
        except ConnectionError:
            pass  # the client went away
        finally:
            self._watches.discard(queue)
        return response

    async def _stream(
        self,
        response: web.StreamResponse,
        queue: asyncio.Queue[Change | int],
        target: Target,
        query: dict[str, str],
        *,
        partial: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + float(query.get("timeoutSeconds") or 3600)
        while (left := ends_at - loop.time()) > 0:
            try:
                async with asyncio.timeout(min(left, self.bookmark_seconds)):
                    item = await queue.get()
            except TimeoutError:
                # Never ahead of what waits in the queue: a client would go on from there and miss it. None of
                # Events, of which a real server keeps no watch cache.
                marks = target.resource.plural != "events" and queue.empty()
                if marks and query.get("allowWatchBookmarks") in ("1", "true"):
                    await _send(response, "BOOKMARK", self._bookmark(target.resource))
                continue
            if isinstance(item, int):
                if item:
                    await _send(response, "ERROR", _status(Refused(item, _REASONS.get(item, ""), "scripted")))
                return
            for kind, body in _events(item, target, query):
                await _send(response, kind, partial_metadata(body) if partial else body)

    def _bookmark(self, kind: Resource) -> Json:
        meta = {"resourceVersion": str(self.store.version)}
        return {"apiVersion": kind.path, "kind": kind.kind, "metadata": meta}


_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


async def _send(response: web.StreamResponse, kind: str, body: Json) -> None:
    await response.write(json.dumps({"type": kind, "object": body}).encode() + b"\n")


def _events(change: Change, target: Target, query: dict[str, str]) -> Iterator[tuple[str, Json]]:
    """What a watcher with these selectors sees: an object that leaves the selection is DELETED for it."""
    if change.resource != target.resource:
        return
    body = change.new or change.old or {}
    if target.namespace not in ("", body["metadata"].get("namespace", "")):
        return
    selectors = query.get("labelSelector", ""), query.get("fieldSelector", "")
    before = change.old is not None and selected(change.old, *selectors)
    after = change.new is not None and selected(change.new, *selectors)
    if before or after:
        kind = "MODIFIED" if before and after else "ADDED" if after else "DELETED"
        yield kind, body


def _is_status(target: Target) -> bool:
    if target.subresource not in ("", "status"):
        raise Refused(404, "NotFound", f"no subresource {target.subresource}")
    return target.subresource == "status"


def _target(path: str) -> Target:
    for item in RESOURCES:
        prefix = f"/api/{item.path}" if "/" not in item.path else f"/apis/{item.path}"
        match = re.fullmatch(
            rf"{prefix}(?:/namespaces/([^/]+))?/{item.plural}(?:/([^/]+))?(?:/([^/]+))?", path
        )
        if match:
            return Target(item, *(part or "" for part in match.groups()))
    raise Refused(404, "NotFound", f"the server could not find the requested resource: {path}")


def _discovery(path: str) -> Json | None:
    """The discovery documents that a generic client asks for."""
    groups = sorted({item.path for item in RESOURCES if "/" in item.path})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
        listed = [
            {"name": item["groupVersion"].split("/")[0], "versions": [item], "preferredVersion": item}
            for item in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    for version in ("v1", *groups):
        if path == (f"/api/{version}" if version == "v1" else f"/apis/{version}"):
            listed = [_resource_entry(item) for item in RESOURCES if item.path == version]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": listed}
    return None


def _resource_entry(item: Resource) -> Json:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    names = {"name": item.plural, "singularName": item.kind.lower(), "kind": item.kind}
    return names | {"namespaced": item.namespaced, "verbs": verbs}


def _status(refused: Refused) -> Json:
    failure = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return failure | {"message": refused.message, "reason": refused.reason, "code": refused.code}


def _refusal(refused: Refused) -> web.Response:
    headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
    return web.json_response(_status(refused), status=refused.code, headers=headers)
