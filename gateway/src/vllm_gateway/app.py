"""Puts the parts together, and runs them: the request loop, the management thread, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from vllm_gateway import __version__, tasks
from vllm_gateway.discovery.source import Source, TableHolder
from vllm_gateway.discovery.static import StaticSource
from vllm_gateway.output import own_thread
from vllm_gateway.policy.admission import Admission
from vllm_gateway.policy.cache import make_store
from vllm_gateway.policy.keyring import Keyring
from vllm_gateway.policy.queue import Queues
from vllm_gateway.policy.rates import Rates
from vllm_gateway.policy.room import Room
from vllm_gateway.policy.shared import Shared
from vllm_gateway.routing.balance import Balancer
from vllm_gateway.routing.health import Ejection, Health
from vllm_gateway.routing.load import Load
from vllm_gateway.routing.pick import strategies
from vllm_gateway.settings import Settings
from vllm_gateway.sockets import accept_with_data, bind, notice_dead_peers, reserve_descriptors
from vllm_gateway.telemetry import UNKNOWN_MODEL, AccessLog, Metrics, Written
from vllm_gateway.tls import certificate_of
from vllm_gateway.tracing import make_tracing
from vllm_gateway.upstream.attempt import Engines
from vllm_gateway.upstream.client import Client
from vllm_gateway.web import errors
from vllm_gateway.web.docs import describe_relayed_routes
from vllm_gateway.web.edge import Edge
from vllm_gateway.web.health import Management, health_router, management_server
from vllm_gateway.web.models import models_router
from vllm_gateway.web.protocol import GatewayProtocol, Port
from vllm_gateway.web.records import Records
from vllm_gateway.web.resting import RestingServer
from vllm_gateway.web.services import Lifecycle, Services
from vllm_gateway.web.stall import unread_bytes

_LOG = logging.getLogger("vllm_gateway")
_CLEANUP_SECONDS = 5.0
_FLUSH_SECONDS = 1.0
_FLUSH_POLL_SECONDS = 0.02
_BEAT_SECONDS = 1.0
_BUSY_BEAT_SECONDS = 0.1
_MANY_GAPS = 2000  # a second; so many are counted in a quarter of a millisecond
_POLL_SECONDS = 0.1
_NEW_OBJECTS = 100_000  # more than there were, before a collection: 1,500 streams' (of Python's own 700, ten)
_SWEEP_SECONDS = 60.0
_LEAST_TLS_CLOSE_SECONDS = 30.0
_GOODBYE_SECONDS = 5.0


class Gateway:
    """Everything of one gateway but its sockets. `log` is where the access log goes, else standard output."""

    def __init__(self, settings: Settings, log: Written | None = None) -> None:
        timeouts = settings.timeouts
        self.holder = TableHolder()
        self.metrics = Metrics()
        self.client = Client(connect_timeout=timeouts.connect, keep_alive=timeouts.upstream_keep_alive)
        self.engines = Engines(self.client, make_balancer(settings), self.metrics)
        self.queues = Queues(settings.queue)
        self.shared = Shared(settings.redis)
        self.keyring = Keyring(settings.auth)
        self.certificate = certificate_of(settings.tls)
        self.services = Services(
            settings,
            self.holder,
            self.engines,
            Admission(self.keyring, Rates(self.shared)),
            self.queues,
            Room(settings.limits.held_bytes),
            make_store(settings.response_cache, self.shared),
            self.metrics,
            Records(
                self.metrics,
                AccessLog(log or sys.stdout, level=settings.log_level, as_json=settings.log_format == "json"),
            ),
            Lifecycle(),
            make_tracing(settings.tracing),
        )
        self.source = self._make_source(settings)
        self.holder.tell(self.queues.follow)
        self.holder.tell(self.engines.load.follow)
        self.holder.tell(self.engines.balancer.follow)
        self.holder.tell(self.engines.follow)
        self.edge = Edge(self.services, make_api(self.services), self.start, self.stop)
        readings = self.metrics.readings
        readings.in_flight = self._in_flight
        readings.queued = lambda: {key: waiting for key, (waiting, _) in self.queues.snapshot().items()}
        readings.endpoints = lambda: {key: len(m.endpoints) for key, m in self.holder().models.items()}
        readings.ejected = lambda: self.engines.balancer.ejected(self.holder().models)
        readings.key_problem = lambda: self.keyring.problem
        readings.redis_away = lambda: self.shared.away
        readings.table_age = self.source.age
        if (certificate := self.certificate) is not None:
            readings.certificate_problem = lambda: certificate.problem
        self._background: list[asyncio.Task[None]] = []

    def _in_flight(self) -> Mapping[str, int]:
        """An idle model is a 0, not a gap in a graph."""
        return {**dict.fromkeys(self.holder().models, 0), **self.engines.load.snapshot()[0]}

    def _make_source(self, settings: Settings) -> Source:
        if settings.backends:
            key = os.environ.get("VLLM_API_KEY") or None
            return StaticSource(settings.backends, self.holder, self.client, settings.refresh_interval, key)
        # Only here, since it takes 55 MB: a gateway with static backends needs none of it.
        from vllm_gateway.discovery.engine_keys import MasterKey
        from vllm_gateway.discovery.kubernetes import KubernetesSource

        master = MasterKey(settings.engine_keys.master_key_file)
        return KubernetesSource(self.holder, settings.watch_namespaces, master)

    async def start(self) -> None:
        await self.keyring.start()
        await self.source.start()
        self._background = [tasks.start("beat", self._beat), tasks.start("sweep", self._sweep)]
        if self.certificate is not None:
            self._background.append(tasks.start("certificate", self.certificate.follow))

    async def stop(self) -> None:
        await self.source.stop()
        await self.keyring.stop()
        await self.services.admission.rates.stop()
        await self.services.answers.stop()
        await self.shared.close()
        self.client.close()
        if self.services.tracing is not None:
            await asyncio.to_thread(self.services.tracing.stop)
        await tasks.stop(self._background)
        self.services.records.flush()

    async def _beat(self) -> None:
        pause = _BEAT_SECONDS
        while True:
            self.services.lifecycle.beat = time.monotonic()
            busy = self.metrics.settle_gaps() > _MANY_GAPS * pause
            pause = _BUSY_BEAT_SECONDS if busy else _BEAT_SECONDS
            await asyncio.sleep(pause)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.forget_absent(time.monotonic())

    def forget_absent(self, now: float) -> None:
        """Lets go of metrics of models and keys that are gone. What is under way is still about its model."""
        self.services.records.flush()  # what is told later would come back as a series of its own
        models = self.holder().models.keys() | self.engines.load.by_model.keys() | {UNKNOWN_MODEL}
        self.metrics.forget_absent("model", models, now)
        self.metrics.forget_absent("key", self.keyring.names, now)


def make_balancer(settings: Settings) -> Balancer:
    ejection = Ejection(**settings.ejection.model_dump())
    health = Health(time.monotonic, ejection)
    routing = settings.routing.strategy
    return Balancer(Load(time.monotonic), health, strategies(), routing, settings.queue.max_in_flight)


def make_api(services: Services) -> FastAPI:
    """The routes that FastAPI answers, and the OpenAPI document of all of them."""
    api = FastAPI(
        title="vllm-fleet gateway",
        version=__version__,
        summary="Chat streamed from vLLM: a simple API and the OpenAI-compatible one.",
        redoc_url=None,
        redirect_slashes=False,
    )
    api.include_router(models_router(services))
    api.include_router(health_router(services))
    errors.register(api)
    describe_relayed_routes(api)
    return api


class Server(RestingServer):
    """uvicorn with a drain: it goes on accepting while load balancers notice, then lets streams finish."""

    def __init__(self, gateway: Gateway, *, share_port: bool = False) -> None:
        settings = gateway.services.settings
        super().__init__(server_config(gateway))
        self._gateway = gateway
        self._share_port = share_port
        self._delay = settings.shutdown_delay
        self._write_stall = settings.timeouts.write_stall
        self._handshake_timeout = settings.limits.header_timeout
        self._drain_timeout = settings.drain_timeout
        self._lifecycle = gateway.services.lifecycle
        self._drain: asyncio.Task[None] | None = None
        self._hanging_up: list[asyncio.Task[None]] = []
        self._scheme = "http" if gateway.certificate is None else "https"
        self._source = ", ".join(backend.url for backend in settings.backends) or "kubernetes"
        gateway.metrics.readings.connections = lambda: len(self.server_state.connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        await super().startup(sockets=[])  # its listener would give a TLS handshake a minute
        self.started = False
        try:
            listener = await self._listen()
        except OSError as error:
            await self.lifespan.shutdown()
            where = f"{self.config.host}:{self.config.port}"
            raise OSError(f"cannot listen on {where}: {error.strerror or error}") from error
        self.servers = [listener]
        self.started = True
        if self.config.ssl:
            self._hanging_up = [tasks.start("goodbyes", self._hang_up)]
        for sock in listener.sockets:
            notice_dead_peers(sock, self._write_stall)
            accept_with_data(sock)
        self._lifecycle.listening = True
        host, port, *_ = listener.sockets[0].getsockname()
        url = f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        _LOG.info("listening", extra={"fields": {"url": url, "source": self._source}})

    def make_protocol(self) -> Callable[[], asyncio.Protocol]:
        """What makes the protocol of each new connection."""
        settings = self._gateway.services.settings
        port = Port(
            self.config.loaded_app,
            self.lifespan.state,
            self.server_state,
            self._gateway.edge.relay,
            limits=settings.limits,
            keep_alive=self.config.timeout_keep_alive,
            write_stall=settings.timeouts.write_stall,
        )
        return functools.partial(GatewayProtocol, port)

    async def _listen(self) -> asyncio.Server:
        config = self.config
        return await asyncio.get_running_loop().create_server(
            self.make_protocol(),
            config.host,
            config.port,
            backlog=config.backlog,
            reuse_port=self._share_port or None,
            ssl=config.ssl,
            ssl_handshake_timeout=self._handshake_timeout if config.ssl else None,
            # Without TLS what was written before a close goes on to a slow reader for as long as it reads.
            ssl_shutdown_timeout=max(self._drain_timeout, _LEAST_TLS_CLOSE_SECONDS) if config.ssl else None,
        )

    async def _hang_up(self) -> None:
        """Ends TLS connections that were closed here, whose caller has read everything and says no goodbye:
        RFC 8446 (6.1) wants one from both sides, and uvloop would wait for it as long as for a slow reader.
        """
        silent: set[asyncio.Transport] = set()
        while True:
            await asyncio.sleep(_GOODBYE_SECONDS)
            transports = {connection.transport for connection in self.server_state.connections}
            done = {each for each in transports if each.is_closing() and not unread_bytes(each)}
            for transport in done & silent:
                transport.abort()
            silent = done

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGTERM drains. Ctrl+C drains too but does not wait for load balancers; again, it just stops."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if self._lifecycle.draining and sig == signal.SIGINT:
            self.force_exit = self.should_exit = True
            return
        self.drain(self._delay if sig == signal.SIGTERM else 0.0)

    def drain(self, delay: float) -> None:
        """Stops accepting in `delay` seconds; from now on /readyz and /health say so."""
        if self._drain is not None:
            return
        _LOG.info("draining", extra={"fields": {"delay": delay, "timeout": self._drain_timeout}})
        self._lifecycle.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._stop_after(delay))

    async def _stop_after(self, delay: float) -> None:
        await asyncio.sleep(delay)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the listener, waits for requests, cancels what is left; each then says so to its caller."""
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        until = time.monotonic() + self._drain_timeout
        await self._wait_for_requests(self._drain_timeout)
        left = list(self.server_state.tasks)
        if left:
            _LOG.warning("cancelling", extra={"fields": {"requests": len(left)}})
        for request in left:
            request.cancel()
        await self._wait_for_requests(_CLEANUP_SECONDS)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._wait_for_readers(until)
        await tasks.stop(self._hanging_up)
        await self.lifespan.shutdown()
        _LOG.info("stopped")

    async def _wait_for_requests(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := self.server_state.tasks) and not self.force_exit and time.monotonic() < until:
            await asyncio.wait(left, timeout=_POLL_SECONDS)  # in slices: a second Ctrl+C ends the wait

    async def _wait_for_readers(self, until: float) -> None:
        """Closing transports still write what they hold: of a large answer that may be most of it."""
        soon = time.monotonic() + _FLUSH_SECONDS
        while (connections := self.server_state.connections) and not self.force_exit:
            # With what the kernel holds: over TLS nothing else tells of the last of what was written.
            unsent = any(unread_bytes(connection.transport) for connection in connections)
            if time.monotonic() >= (max(soon, until) if unsent else soon):
                break
            await asyncio.sleep(_FLUSH_POLL_SECONDS)


def server_config(gateway: Gateway) -> uvicorn.Config:
    settings, certificate = gateway.services.settings, gateway.certificate
    context = None if certificate is None else (lambda _config, _default: certificate.context)
    return uvicorn.Config(
        gateway.edge,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(settings.timeouts.keep_alive),
        backlog=2048,
        ssl_context_factory=context,
    )


class ManagementThread:
    """The management port, with a loop and a thread of its own. `listener` is bound to it."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        listener.listen()  # from now on a probe waits for its answer instead of being refused
        self._server = management_server(Management(services))
        run = functools.partial(self._server.run, [listener])
        self._thread = threading.Thread(target=run, name="management", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=2)


def run(settings: Settings) -> None:
    """Serves until a signal. Raises OSError where a port is taken."""
    bind(settings.host, settings.port).close()
    serve(settings, bind(settings.host, settings.management_port), Server)


def serve(settings: Settings, management: socket.socket, make_server: Callable[[Gateway], Server]) -> None:
    """Serves until a signal, with a management port that is bound already."""
    # Otherwise each counter has a second series, which no dashboard reads.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    reserve_descriptors()
    with own_thread() as output:
        gateway = Gateway(settings, output)
        thread = ManagementThread(gateway.services, management)
        thread.start()
        # What is there now stays: no collection need look at it again. Of what comes little is garbage that
        # only a collection finds, and each makes all streams wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_NEW_OBJECTS)
        try:
            make_server(gateway).run()
        finally:
            thread.stop()
            gateway.services.records.flush()  # of requests that outlived even the gateway's stop
