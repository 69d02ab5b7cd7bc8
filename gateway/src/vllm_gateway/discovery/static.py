"""Static backends: `VLLM_URL` or `backends:`. Their model names are asked from their own `/v1/models`.

A backend need not be up: it is asked again until it is, and what is known is said in /health and the log.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vllm_gateway import tasks
from vllm_gateway.discovery.source import TableHolder
from vllm_gateway.errors import UpstreamFailure
from vllm_gateway.routing.table import Endpoint, Model, Table
from vllm_gateway.settings import Backend
from vllm_gateway.upstream.client import Client
from vllm_gateway.upstream.http1 import Head

_ASK_TIMEOUT = 5.0
_MAX_LIST = 1024 * 1024
_GONE = frozenset({"connect", "bad_response"})


@dataclass(frozen=True, slots=True)
class _Name:
    """One entry of a backend's list; `parent` is the model that an adapter belongs to."""

    name: str
    created: int
    parent: str = ""


@dataclass(slots=True)
class _Backend:
    """What is known of one backend. `names` are the last that it told; `problem` is why it is not used, and
    `key_problem` why it gets the key from before.
    """

    settings: Backend
    endpoint: Endpoint
    key_problem: str = ""
    names: tuple[_Name, ...] = ()
    problem: str = "it has not answered yet"
    asked: bool = False

    @property
    def url(self) -> str:
        return self.settings.url


def endpoint_of(backend: Backend, default_key: str | None) -> Endpoint:
    """The endpoint that a URL names. Raises OSError where the key's file cannot be read."""
    parts = urlsplit(backend.url)
    tls = parts.scheme == "https"
    key = Path(backend.api_key_file).read_text().strip() if backend.api_key_file else default_key
    port = parts.port or (443 if tls else 80)
    return Endpoint(backend.url, parts.hostname or "", port, tls, parts.path.rstrip("/"), key)


class StaticSource:
    """Asks every backend for its models, for ever: each `interval`, six times as often while it fails."""

    def __init__(
        self,
        backends: Sequence[Backend],
        holder: TableHolder,
        client: Client,
        interval: float,
        key: str | None,
    ) -> None:
        self._backends = [_Backend(backend, endpoint_of(backend, key)) for backend in backends]
        self._key = key
        self._holder = holder
        self._client = client
        self._interval = interval
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = time.monotonic()

    async def start(self) -> None:
        """Waits for one round, so that a gateway whose backends are up is ready when it listens."""
        await asyncio.gather(*(self._ask(backend) for backend in self._backends))
        self._publish()
        self._tasks = [
            tasks.start(backend.url, functools.partial(self._follow, backend)) for backend in self._backends
        ]

    async def stop(self) -> None:
        await tasks.stop(self._tasks)

    def age(self) -> float:
        return time.monotonic() - self._heard_at

    async def _follow(self, backend: _Backend) -> None:
        while True:
            await asyncio.sleep(self._interval / 6 if backend.problem else self._interval)
            await self._ask(backend)
            self._publish()

    async def _ask(self, backend: _Backend) -> None:
        if backend.settings.api_key_file is not None:
            await self._read_key(backend)
        try:
            # vLLM makes up a new `created` each time that it is asked, which is no news.
            known = {(name.name, name.parent): name for name in backend.names}
            told = await self._names(backend.endpoint)
            backend.names = tuple(known.get((name.name, name.parent), name) for name in told)
            backend.problem = ""
        except UpstreamFailure as failure:
            # Too busy to answer is no reason to take an engine away from its callers.
            if failure.reason in _GONE or not backend.names:
                backend.problem = failure.detail
        backend.asked = True

    async def _read_key(self, backend: _Backend) -> None:
        try:
            backend.endpoint = await asyncio.to_thread(endpoint_of, backend.settings, self._key)
            backend.key_problem = ""
        except OSError as error:
            backend.key_problem = f"its key cannot be read; the one from before stays: {error}"

    async def _names(self, endpoint: Endpoint) -> tuple[_Name, ...]:
        try:
            async with asyncio.timeout(_ASK_TIMEOUT):
                head, body = await self._get(endpoint, "/v1/models")
        except TimeoutError:
            raise UpstreamFailure("timeout", f"no answer to GET /v1/models in {_ASK_TIMEOUT:g} s") from None
        if head.status != 200:
            reason = "bad_response" if head.status < 500 else "busy"
            raise UpstreamFailure(reason, f"GET /v1/models answered {head.status}")
        return _read_names(body)

    async def _get(self, endpoint: Endpoint, path: str) -> tuple[Head, bytes]:
        connection = await self._client.dial(endpoint)
        try:
            head = await connection.exchange(_get_request(endpoint, path))
            body = _Collect()
            connection.start(body)
            return head, await body.whole
        finally:
            connection.close()

    def _publish(self) -> None:
        working = [backend for backend in self._backends if not backend.problem]
        if working:
            self._heard_at = time.monotonic()
        told = [
            (backend.url, why) for backend in self._backends for why in (backend.problem, backend.key_problem)
        ]
        notes = [f"{url}: {why}" for url, why in told if why]
        table = Table.of(_models(self._backends), complete=bool(working), notes=notes)
        if table != self._holder():
            self._holder.put(table)


@dataclass(slots=True)
class _Collect:
    """A small body, whole."""

    whole: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    pieces: bytearray = field(default_factory=bytearray)

    def data(self, payload: bytes) -> None:
        self.pieces += payload
        if len(self.pieces) > _MAX_LIST:
            self.failed(UpstreamFailure("bad_response", "the list of models is too long"))

    def end(self, payload: bytes) -> None:
        self.data(payload)
        if not self.whole.done():
            self.whole.set_result(bytes(self.pieces))

    def failed(self, failure: UpstreamFailure) -> None:
        if not self.whole.done():
            self.whole.set_exception(failure)


def _models(backends: Sequence[_Backend]) -> list[Model]:
    """One model a name: its endpoints are the working backends that told it."""
    told = [name for backend in backends for name in backend.names]
    known = {name.name for name in told if not name.parent}
    names = {name.name: name.created for name in told if name.parent not in known}
    adapters = {
        model: tuple(dict.fromkeys(name.name for name in told if name.parent == model)) for model in names
    }
    return [_model(name, created, adapters[name], backends) for name, created in names.items()]


def _model(name: str, created: int, adapters: tuple[str, ...], backends: Sequence[_Backend]) -> Model:
    having = [backend for backend in backends if any(known.name == name for known in backend.names)]
    endpoints = tuple(backend.endpoint for backend in having if not backend.problem)
    problems = "; ".join(f"{backend.url}: {backend.problem}" for backend in having if backend.problem)
    reason = "" if endpoints else "BackendDown"
    return Model(
        name,
        name,
        endpoints=endpoints,
        reason=reason,
        message=problems,
        created=created,
        adapters=adapters,
        granted_adapters=adapters,
    )


def _read_names(body: bytes) -> tuple[_Name, ...]:
    try:
        data = json.loads(body)["data"]
        return tuple(
            _Name(str(item["id"]), int(item.get("created") or 0), str(item.get("parent") or ""))
            for item in data
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise UpstreamFailure("bad_response", "GET /v1/models answered no list of models") from None


def _get_request(endpoint: Endpoint, path: str) -> bytes:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [f"GET {endpoint.prefix}{path} HTTP/1.1", f"host: {host}:{endpoint.port}", "connection: close"]
    if endpoint.key is not None:
        lines.append(f"authorization: Bearer {endpoint.key}")
    return "\r\n".join((*lines, "", "")).encode("latin-1")
