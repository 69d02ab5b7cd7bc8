"""Stands between one client and a Kubernetes API server: tells what was asked, and breaks it on demand.

    with ApiProxy(server, open_session) as proxy:
        proxy.url                     # http://127.0.0.1:<port>, for the client's kubeconfig
        proxy.write_kubeconfig(path)
        proxy.requests                # all that came, in order; proxy.writes() leaves reads and Leases out
        proxy.script = lambda call: Answer(503, "away") if call.is_write else None   # instead of the server
        proxy.answered = lambda call: ...   # the server has answered, the client has not heard it yet
        proxy.cut()                   # ends every request under way; the client may come again
        proxy.part(); proxy.join()    # as a network that is gone: nothing comes, nothing goes, nothing ends

The server behind it is real, or tests/fakes/kube_api. It runs in a thread of its own, since end-to-end tests
wait for kubectl. The client speaks plain HTTP to it; `open_session` brings TLS and credentials.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import aiohttp
import yaml
from aiohttp import web
from yarl import URL

FORWARDED = ("Accept", "Content-Type", "User-Agent")
PATIENCE_SECONDS = 15.0


@dataclass
class Call:
    """One request. `at` is on the monotonic clock; `status` is the server's, 0 while there is none."""

    method: str
    path: str
    at: float
    watches: bool = False
    status: int = 0

    @property
    def is_write(self) -> bool:
        """Leases aside: they are written by whoever stands by, too."""
        return self.method != "GET" and "/leases" not in self.path

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


@dataclass(frozen=True)
class Answer:
    """What the client gets in the server's place: an error, or for a watch an ERROR event that ends it."""

    code: int
    message: str = "scripted"
    reason: str = ""

    def response(self, call: Call) -> web.Response:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
        }
        if call.watches:
            return web.json_response(text=json.dumps({"type": "ERROR", "object": status}) + "\n")
        return web.json_response(status, status=self.code)


@dataclass
class ApiProxy:
    """See the module's docstring. `server` is the API server's URL without a path."""

    server: str
    open_session: Callable[[], aiohttp.ClientSession] = aiohttp.ClientSession
    script: Callable[[Call], Answer | None] = lambda _call: None
    answered: Callable[[Call], None] = lambda _call: None
    requests: list[Call] = field(default_factory=list)

    # Life

    def __enter__(self) -> Self:
        self._ready, self._port = threading.Event(), 0
        self._connections: set[asyncio.Transport] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="api-proxy")
        self._thread.start()
        assert self._ready.wait(PATIENCE_SECONDS), "the proxy does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the proxy does not end"
        # A connection to the server that was given up half-way has no owner that would close it. That says
        # nothing of who is tested, and would warn later, in whatever test runs then.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    async def _run(self) -> None:
        self._loop, self._ended, self._joined = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._joined.set()
        app = web.Application(client_max_size=8 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        # A request whose client gave up while parted must not come through afterwards.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        async with self.open_session() as self._session:
            listening = socket.create_server(("127.0.0.1", 0), backlog=128)
            self._port = listening.getsockname()[1]
            await web.SockSite(runner, listening).start()
            self._ready.set()
            await self._ended.wait()
            self._loop.remove_reader(listening)
            for _ in range(3):  # turns for who was accepted last: asyncio would lose them with the server
                await asyncio.sleep(0)
            self._abort_all()
            await runner.cleanup()
            if self._session.connector is not None:
                await self._session.connector.close(abort_ssl=True)
            await asyncio.sleep(0)  # what was aborted is closed in the loop's next turn

    # What a test says

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def write_kubeconfig(self, path: Path) -> Path:
        named = {"name": "proxy"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [named | {"cluster": {"server": self.url}}],
            "users": [named | {"user": {}}],
            "contexts": [named | {"context": {"cluster": "proxy", "user": "proxy"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def writes(self) -> list[Call]:
        return [call for call in self.requests if call.is_write]

    @property
    def under_way(self) -> int:
        """Requests that have come and are not answered to the end."""
        return len(self._connections)

    def cut(self) -> None:
        self._now(self._abort_all)

    def part(self) -> None:
        self._now(self._joined.clear)

    def join(self) -> None:
        self._now(self._joined.set)

    # Serving

    def _now(self, act: Callable[[], None]) -> None:
        """In the proxy's thread, where `script` and `answered` are called; it is done when this returns."""
        if threading.current_thread() is self._thread:
            act()
            return
        done = threading.Event()
        self._loop.call_soon_threadsafe(act)
        self._loop.call_soon_threadsafe(done.set)  # in order
        assert done.wait(PATIENCE_SECONDS), "the proxy does not listen"

    def _abort_all(self) -> None:
        for transport in self._connections:
            transport.abort()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        watches = request.query.get("watch", "").lower() in ("1", "true")
        call = Call(request.method, request.path, time.monotonic(), watches)
        self.requests.append(call)
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        self._connections.add(transport)
        try:
            await self._joined.wait()
            if (answer := self.script(call)) is not None:
                return answer.response(call)
            await self._joined.wait()  # the script may have parted them
            return await self._forward(request, call)
        finally:
            self._connections.discard(transport)

    async def _forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        url = URL(self.server + request.raw_path, encoded=True)
        body = await request.read()
        patience = aiohttp.ClientTimeout(total=None if call.watches else PATIENCE_SECONDS)
        async with self._session.request(
            call.method, url, data=body or None, headers=headers, timeout=patience
        ) as upstream:
            call.status = upstream.status
            self.answered(call)
            response = web.StreamResponse(status=upstream.status)
            response.content_type = upstream.content_type
            try:
                await response.prepare(request)
                async for piece in upstream.content.iter_any():
                    await self._joined.wait()
                    await response.write(piece)
                await response.write_eof()
            except ConnectionError:  # the client is gone, or was cut off
                pass
            finally:
                if upstream.connection is not None and upstream.connection.transport is not None:
                    upstream.connection.transport.abort()  # not at its end: no good-bye of TLS
            return response
