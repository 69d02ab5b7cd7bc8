"""The management port of several workers: what they say, added up. Runs in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vllm_gateway.instruments import Absences
from vllm_gateway.telemetry import KEPT_SECONDS, UNKNOWN_MODEL
from vllm_gateway.web.channel import Receive, Scope, Send
from vllm_gateway.web.health import Answer, management_server, respond, text_page

_TIMEOUT = 3.0
_NOT_THERE = 0  # in place of a status: nobody listens, the parent is about to start a new one
_SILENT = -1  # it listens and does not answer

# Gauges of which the workers tell the same, or of which the worst counts; the others are added up.
GREATEST = frozenset(
    {
        "vllm_gateway_certificate_failed",
        "vllm_gateway_ejected_endpoints",
        "vllm_gateway_endpoints",
        "vllm_gateway_key_file_failed",
        "vllm_gateway_redis_away",
        "vllm_gateway_table_age_seconds",
    }
)

Series = tuple[str, tuple[tuple[str, str], ...]]
Reports = Mapping[str, Any]


@dataclass(slots=True)
class _Counted:
    """The counters of one worker when they were last seen, and when that worker had begun."""

    born: float = 0.0
    last: dict[Series, float] = field(default_factory=dict)


class Totals(Collector):
    """Metrics of all workers as those of one gateway.

    A counter never goes back: what a worker had counted stays when it dies, and when it lets go of a model or
    an API key that is gone, which each does in its own time. It goes once none has had that for KEPT_SECONDS.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models, self._keys = Absences(KEPT_SECONDS), Absences(KEPT_SECONDS)
        self._keys_let_go: set[str] = set()
        self._seen = [_Counted() for _ in range(workers)]
        self._kept: dict[Series, float] = {}
        self._families: dict[str, Metric] = {}
        self._gauges: dict[Series, float] = {}

    def update(self, found: Sequence[tuple[float, str] | None]) -> None:
        """Of each worker when it began and its metrics as text; None for one that does not answer."""
        self._gauges = {}
        for counted, worker in zip(self._seen, found, strict=True):
            if worker is not None:
                self._read(counted, *worker)
        self._forget_absent()

    def collect(self) -> Iterable[Metric]:
        totals = dict(self._kept)
        for counted in self._seen:
            for series, value in counted.last.items():
                totals[series] = totals.get(series, 0.0) + value
        by_name: dict[str, list[tuple[Series, float]]] = {}
        for series, value in (totals | self._gauges).items():
            by_name.setdefault(series[0], []).append((series, value))
        for family in self._families.values():
            metric = Metric(family.name, family.documentation, family.type)
            for name in dict.fromkeys(sample.name for sample in family.samples):
                for (_, labels), value in by_name.get(name, ()):
                    metric.add_sample(name, dict(labels), value)
            yield metric

    def _read(self, counted: _Counted, born: float, text: str) -> None:
        counts: dict[Series, float] = {}
        for family in text_string_to_metric_families(text):
            if family.samples or family.name not in self._families:
                self._families[family.name] = family
            for sample in family.samples:
                series = (sample.name, tuple(sorted(sample.labels.items())))
                if family.type == "gauge":
                    self._gauge(series, sample.value)
                else:
                    counts[series] = sample.value
        same, before = born == counted.born, counted.last
        counted.born, counted.last = born, counts
        for series, value in before.items():
            if not same or series not in counts:
                self._kept[series] = self._kept.get(series, 0.0) + value
        if same and before.keys() - counts.keys():
            self._keys_let_go |= _values_of("key", before) - _values_of("key", counts)

    def _forget_absent(self) -> None:
        """A model in a worker's table has gauges. Nothing tells so of a key, but that it was let go."""
        now, held = self._clock(), [self._gauges, *(counted.last for counted in self._seen)]
        models = _values_of("model", self._kept) - {UNKNOWN_MODEL}
        self._drop("model", self._models.over(models.difference(*_each("model", held)), now))
        self._keys_let_go.difference_update(*_each("key", held))
        gone = self._keys.over(self._keys_let_go, now)
        self._drop("key", gone)
        self._keys_let_go -= gone

    def _drop(self, label: str, gone: set[str]) -> None:
        kept = self._kept.items() if gone else ()
        for series in [series for series, _ in kept if dict(series[1]).get(label) in gone]:
            del self._kept[series]

    def _gauge(self, series: Series, value: float) -> None:
        before = self._gauges.get(series)
        if before is None:
            self._gauges[series] = value
        else:
            self._gauges[series] = max(before, value) if series[0] in GREATEST else before + value


def _values_of(label: str, found: Iterable[Series]) -> set[str]:
    return {value for _, labels in found for name, value in labels if name == label}


def _each(label: str, held: Iterable[Iterable[Series]]) -> Iterator[set[str]]:
    return (_values_of(label, found) for found in held)


def add_loads(reports: Sequence[Reports]) -> dict[str, Any]:
    """`/load` of all workers as that of one gateway: as young as the youngest, as idle as the busiest."""
    keys = dict.fromkeys(key for report in reports for key in report["models"])
    return {
        "started_at": max(report["started_at"] for report in reports),
        "draining": any(report["draining"] for report in reports),
        "models": {
            key: _add_models([r["models"][key] for r in reports if key in r["models"]]) for key in keys
        },
    }


def _add_models(models: Sequence[Reports]) -> dict[str, Any]:
    endpoints: dict[str, int] = {}
    for model in models:
        for name, count in model["endpoints"].items():
            endpoints[name] = endpoints.get(name, 0) + count
    return {
        "in_flight": sum(model["in_flight"] for model in models),
        "queued": sum(model["queued"] for model in models),
        "oldest_queued_seconds": max(model["oldest_queued_seconds"] for model in models),
        "idle_seconds": min(model["idle_seconds"] for model in models),
        "endpoints": endpoints,
    }


class Together:
    """The ASGI application: asks every worker, on its port of the loopback interface, for each request."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._totals = Totals(len(ports))
        self._one_scrape = asyncio.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self._totals)
        self._routes: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/metrics": self._metrics,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/load": self._load,
        }

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        if scope["type"] == "http":
            route = self._routes.get(scope["path"])
            await respond(scope, send, text_page(404, "not found") if route is None else await route())

    async def _metrics(self) -> Answer:
        async with (
            self._one_scrape
        ):  # or an answer of a worker that has died could come after its successor's
            loads, texts = await asyncio.gather(self._ask("/load"), self._ask("/metrics"))
            both = zip(loads, texts, strict=True)
            self._totals.update(
                [
                    (json.loads(load.body)["started_at"], text.body.decode())
                    if load.well and text.well
                    else None
                    for load, text in both
                ]
            )
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)

    async def _livez(self) -> Answer:
        """A worker that is not there is being started; only one that hangs needs somebody."""
        return _verdict(reply for reply in await self._ask("/livez") if reply.status != _NOT_THERE)

    async def _readyz(self) -> Answer:
        return _verdict(await self._ask("/readyz"))

    async def _load(self) -> Answer:
        """Whoever scales by it must know of every request: better no answer than half of one."""
        replies = await self._ask("/load")
        if not all(reply.well for reply in replies):
            return _verdict(replies)
        return 200, "application/json", json.dumps(add_loads([json.loads(r.body) for r in replies])).encode()

    async def _ask(self, path: str) -> list[Reply]:
        asked = (ask(number, port, path) for number, port in enumerate(self._ports, 1))
        return list(await asyncio.gather(*asked))


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker says. Without an answer `status` is no status of HTTP."""

    worker: int
    status: int
    body: bytes = b""

    @property
    def well(self) -> bool:
        return self.status == 200


async def ask(worker: int, port: int, path: str) -> Reply:
    """A worker's page. Never raises."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                if f"content-length: {len(body)}\r".encode() not in head + b"\r":
                    return Reply(worker, _NOT_THERE, b"broke off")
            finally:
                writer.transport.abort()
            return Reply(worker, int(head.split(b" ", 2)[1]), body)
    except TimeoutError:
        return Reply(worker, _SILENT, b"does not answer")
    except (OSError, ValueError, IndexError):  # not there, or gone in the middle
        return Reply(worker, _NOT_THERE, b"is not running")


def _verdict(replies: Iterable[Reply]) -> Answer:
    ill = [reply for reply in replies if not reply.well]
    said = (f"worker {reply.worker}: {reply.body.decode(errors='replace').strip()}" for reply in ill)
    return text_page(503, "; ".join(said)) if ill else text_page(200, "ok")


def report(listener: socket.socket, ports: Sequence[int], lifeline: int) -> None:
    """Serves until SIGTERM, or until the parent is gone: the other end of `lifeline` is closed then."""
    asyncio.run(_serve(management_server(Together(ports)), listener, lifeline))


async def _serve(server: uvicorn.Server, listener: socket.socket, lifeline: int) -> None:
    asyncio.get_running_loop().add_reader(lifeline, os._exit, 1)
    await server.serve(sockets=[listener])
