"""The watch of VLLMModels, which is kopf's: by `@kopf.on.event` alone.

So kopf writes nothing into the cluster: no finalizer, no annotation, no diff base. It serialises per object
and drops a handler's errors, hence a handler only hands the event on. It runs in a thread with a loop of its
own: kopf.operator() takes over the signals of the main thread, and at its end cancels every task of its loop
that is younger than itself, ours too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import aiohttp
import kopf
from kubernetes.aio.client import Configuration

from vllm_operator import names
from vllm_operator.backoff import Backoff
from vllm_operator.kinds import Body

Sink = Callable[[str | None, Body], None]

# kopf's own default gives up after 54 s without an API server, and ends.
API_BACKOFF = Backoff(first=0.5, cap=15)
EXIT_SECONDS = 0.5


def make_registry(sink: Sink, log_in: Callable[[], Awaitable[kopf.AiohttpSession]]) -> kopf.OperatorRegistry:
    """`sink(type, body)` gets every event; the type is None for what an initial list holds."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return await log_in()

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def model_changed(event: kopf.RawEvent, **_: Any) -> None:
        sink(event["type"], dict(event["object"]))

    return registry


def make_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # needs no right to list CRDs and namespaces
    settings.networking.error_backoffs = API_BACKOFF
    settings.networking.request_timeout = 30
    settings.watching.chunk_size = 100
    # A worker serves one object and then idles for 5 s by default: with a limit of 50 workers, only 10 models
    # a second would come through.
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 0.2
    settings.queueing.exit_timeout = EXIT_SECONDS
    settings.process.ultimate_exiting_timeout = None
    return settings


def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """The official client's credentials for kopf, so that there is one way to log in."""
    token = str(configuration.api_key.get("BearerToken") or configuration.api_key.get("authorization") or "")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        token=token.removeprefix("Bearer ").removeprefix("bearer ") or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


def open_session(info: kopf.ConnectionInfo) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context())
    return aiohttp.ClientSession(connector=connector, headers=info.as_http_headers(), trust_env=True)


class ModelWatch:
    """Runs kopf.operator() in its thread."""

    def __init__(
        self, sink: Sink, connection: Callable[[], kopf.ConnectionInfo], namespaces: Sequence[str]
    ) -> None:
        self._sink, self._connection, self._namespaces = sink, connection, namespaces

    async def run(self) -> None:
        """Raises RuntimeError when kopf ends by itself, as it does at an ERROR in a watch other than 410."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()

        def forward(kind: str | None, body: Body) -> None:
            _from_thread(loop, self._sink, kind, body)

        life = _Life(lambda: self._operator(forward), lambda why: _from_thread(loop, _tell, ended, why))
        try:
            why = await asyncio.shield(ended)
        finally:
            await asyncio.to_thread(life.end)
        raise RuntimeError(f"the watch of models has ended: {why}")

    async def _operator(self, sink: Sink) -> None:
        scope: dict[str, Any] = (
            {"namespaces": self._namespaces} if self._namespaces else {"clusterwide": True}
        )
        async with contextlib.AsyncExitStack() as sessions:  # kopf closes none when it is cancelled

            async def log_in() -> kopf.AiohttpSession:
                info = self._connection()
                return kopf.AiohttpSession(
                    server=info.server, aiohttp_session=await sessions.enter_async_context(open_session(info))
                )

            await kopf.operator(
                registry=make_registry(sink, log_in),
                settings=make_settings(),
                standalone=True,
                # Else kopf asks for the user's name, and uid 65532 has none in the image.
                identity=cast("Any", names.FIELD_MANAGER),
                **scope,
            )


class _Life:
    """A coroutine in a thread and a loop of its own, until it ends or is told to; `tell` hears how it ended.

    It is ended by cancelling. With a stop flag, kopf would take its own waiting for the flag for a task that
    hangs, and wait five seconds for it.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], tell: Callable[[str], None]) -> None:
        self._work, self._tell = work, tell
        self._stop: Callable[[], object] = lambda: None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kopf", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ready.wait()
        self._stop()
        self._thread.join(10)

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except asyncio.CancelledError:
            self._tell("it was stopped")
        except Exception as error:  # noqa: BLE001  whatever it was, the caller starts again
            self._tell(f"{type(error).__name__}: {error}")
        else:
            self._tell("it ended")

    async def _run(self) -> None:
        task = asyncio.ensure_future(self._work())
        loop = asyncio.get_running_loop()
        self._stop = lambda: _from_thread(loop, task.cancel)
        self._ready.set()
        await task


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(call, *arguments)


def _tell(ended: asyncio.Future[str], why: str) -> None:
    if not ended.done():
        ended.set_result(why)


def quieten_kopf() -> None:
    """It warns that it does not handle signals here, which is meant, and tells its life at `info`."""
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
