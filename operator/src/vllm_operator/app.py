"""The running operator: the lease, and under it tables, the watch of models, the queue and its reconciles."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import uuid

from kubernetes.aio.client import ApiClient
from prometheus_client import disable_created_metrics

from vllm_operator import __version__
from vllm_operator.backoff import Backoff, Restarts
from vllm_operator.clock import Clock, SystemClock
from vllm_operator.cluster import Cluster, connect
from vllm_operator.engine_keys import EngineKeys
from vllm_operator.errors import ApiError, NotFound, SettingsError
from vllm_operator.events import Recorder
from vllm_operator.handlers import ModelWatch, connection_info
from vllm_operator.kinds import MODELS, Body, ObjectKey
from vllm_operator.lease import Lease
from vllm_operator.management import serve
from vllm_operator.metrics import Metrics
from vllm_operator.names import ModelKey
from vllm_operator.queue import Queue
from vllm_operator.reconcile import Reconciler
from vllm_operator.settings import Settings
from vllm_operator.tasks import stop
from vllm_operator.world import World

log = logging.getLogger(__name__)

# Every watch hears something within 90 s or starts again; a loop that is silent for longer hangs.
SILENCE_SECONDS = 180
LEASE_SILENCE_SECONDS = 60
NO_DEFINITION = "the cluster does not know VLLMModels: is the chart's definition (CRD) installed?"


class Operator:
    """One replica. `run()` ends when cancelled; then the work is ended and the lease given back."""

    def __init__(
        self, client: ApiClient, settings: Settings, namespace: str, identity: str, clock: Clock
    ) -> None:
        self._client, self._settings, self._clock = client, settings, clock
        self.metrics = Metrics(self._bodies)
        self._cluster = Cluster(client, self.metrics.api_error)
        key = ObjectKey(namespace, settings.lease.name)
        self._lease = Lease(self._cluster, key, identity, settings.lease, clock)
        secret = settings.engine_keys.secret
        self._keys = EngineKeys(self._cluster, ObjectKey(namespace, secret) if secret else None)
        self._world: World | None = None
        self._synced = False

    async def run(self) -> None:
        settings = self._settings
        async with serve(
            settings.management_host,
            settings.management_port,
            metrics=lambda: self.metrics.text(leader=self._lease.is_leader),
            live=self.live,
            ready=self.ready,
        ) as port:
            log.info("started", extra={"version": __version__, "management_port": port})
            await self._lease.run(self._work)

    def live(self) -> str:
        """The watches' loops turn. An API server that is away is no reason for a restart; a hung loop is."""
        if self._world is None:
            return ""
        silent = self._clock.monotonic() - self._world.last_activity()
        return f"no watch has been heard of for {silent:.0f} s" if silent > SILENCE_SECONDS else ""

    def ready(self) -> str:
        """Leading with full tables, or standing by and able to see the lease."""
        if self._lease.is_leader:
            return "" if self._synced else "the tables are not complete yet"
        silent = self._clock.monotonic() - self._lease.last_answer
        return f"the lease has not been read for {silent:.0f} s" if silent > LEASE_SILENCE_SECONDS else ""

    def _bodies(self) -> list[Body]:
        return list(self._world.fleet.models.values()) if self._world else []

    async def _work(self) -> None:
        """What a leader does. Everything starts empty: no state but the cluster."""
        world = World(self._cluster, self._settings, self._clock)
        recorder = Recorder(self._cluster)
        reconciler = Reconciler(
            self._cluster,
            world,
            self._settings,
            recorder,
            self._clock,
            self.metrics,
            self._keys.of,
            lambda: queue.preceding > 0,
        )
        queue: Queue[ModelKey] = Queue(
            reconciler,
            self._clock,
            concurrency=self._settings.max_concurrent_reconciles,
            precedes=world.lacks_workload,
        )
        self._world = world
        world.enqueue = queue.add
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(world.run())
                await world.synced()
                await self._first_keys()
                await self._list_models(world, queue)
                self._synced = True
                tasks.create_task(self._watch_models(world, queue))
                tasks.create_task(self._resync(world, queue))
                tasks.create_task(queue.run())
        finally:
            self._world, self._synced = None, False

    async def _watch_models(self, world: World, queue: Queue[ModelKey]) -> None:
        """Starts kopf again where it ends, as it does at some errors, and lists what happened meanwhile."""

        def heard(kind: str | None, body: Body) -> None:
            take_event(world, queue, kind, body)

        watch = ModelWatch(
            heard, lambda: connection_info(self._client.configuration), self._settings.watch_namespaces
        )
        restarts = Restarts(Backoff(first=0.5, cap=15))
        while True:
            began = self._clock.monotonic()
            try:
                await watch.run()
            except RuntimeError as error:
                log.warning("watch restarts", extra={"kind": MODELS.kind, "error": str(error)})
            await self._clock.sleep(restarts.pause(self._clock.monotonic() - began))
            await self._list_models(world, queue)

    async def _resync(self, world: World, queue: Queue[ModelKey]) -> None:
        """Heals a deletion that a watch missed: kopf does not tell of it after a 410."""
        while True:
            await self._clock.sleep(self._settings.resync_seconds)
            await self._list_models(world, queue)
            if await self._ensure_keys():
                for key in world.fleet.models:
                    queue.add(key)

    async def _first_keys(self) -> None:
        """Tries until the master key is there: a model without one would run open, and roll out later."""
        for pause in Backoff(first=0.5, cap=15):
            if await self._ensure_keys() is not None:
                return
            await self._clock.sleep(pause)

    async def _ensure_keys(self) -> bool | None:
        """Whether the master key is another than before; None where it cannot be had now."""
        try:
            return await self._keys.ensure()
        except (ApiError, SettingsError) as error:
            log.warning("no master key", extra={"error": str(error)})
            return None

    async def _list_models(self, world: World, queue: Queue[ModelKey]) -> None:
        """Tries until it has a complete list; without the CRD that is until it is installed."""
        for pause in Backoff(first=0.5, cap=15):
            try:
                listings = [
                    await self._cluster.list(MODELS, namespace)
                    for namespace in self._settings.watch_namespaces or ("",)
                ]
            except ApiError as error:
                why = NO_DEFINITION if isinstance(error, NotFound) else error.message
                log.warning("models not listed", extra={"code": error.code, "error": why})
                await self._clock.sleep(pause)
                continue
            version = min(int(listing.version) for listing in listings)
            for key in world.fleet.replace([body for listing in listings for body in listing.items], version):
                queue.add(key)
            return


def take_event(world: World, queue: Queue[ModelKey], kind: str | None, body: Body) -> None:
    """One event of a VLLMModel; None stands for ADDED in an initial list."""
    meta = body["metadata"]
    if kind == "DELETED":
        concerned = world.fleet.remove(ModelKey(meta["namespace"], meta["name"]), meta["uid"])
    else:
        concerned = world.fleet.put(body) or set()
    for key in concerned:
        queue.add(key)


async def run_operator(settings: Settings) -> None:
    """Runs one replica until SIGTERM or SIGINT."""
    # Otherwise each counter has a second series, which no dashboard reads.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    gc.collect()
    gc.freeze()  # modules and classes stay: looking through them again took a fifth of a render's time
    namespace = os.environ.get("POD_NAMESPACE", "default")
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    async with await connect() as client:
        operator = Operator(client, settings, namespace, identity, SystemClock())
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        job, waiting = asyncio.create_task(operator.run()), asyncio.ensure_future(asked.wait())
        await asyncio.wait((job, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if job.done():
            job.result()  # it never ends by itself but with an error
        await stop(job)
        log.info("stopped")
