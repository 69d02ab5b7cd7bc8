"""A gateway as a real server on the loopback interface, in front of scripted engines.

`gateway` is parametrised over both ways back to the caller: below ASGI, as it ships, and plain ASGI.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop
from engine import FakeEngine
from http_caller import until
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vllm_gateway.app import Gateway, Server
from vllm_gateway.settings import Settings


class QuietServer(Server):
    """Leaves the process's signal handlers alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class PlainServer(QuietServer):
    """With uvicorn's own protocol, which knows nothing but ASGI."""

    def make_protocol(self) -> Callable[[], asyncio.Protocol]:
        return functools.partial(
            HttpToolsProtocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


@dataclass
class Running:
    """A gateway that serves on `port`."""

    gateway: Gateway
    server: Server
    port: int

    @property
    def in_flight(self) -> int:
        return sum(self.gateway.engines.load.by_model.values())

    def metric(self, name: str, **labels: str) -> float:
        self.gateway.services.records.flush()  # else it would come a moment later
        return self.gateway.metrics.registry.get_sample_value(f"vllm_gateway_{name}", labels) or 0.0

    @property
    def permits(self) -> int:
        """Places at models and requests of keys that are held."""
        services = self.gateway.services
        return services.queues.in_use() + services.admission.rates.active

    async def settled(self) -> None:
        """Until nothing is in flight or held and no request task runs; fails after some seconds."""
        room = self.gateway.services.room
        await until(
            lambda: not (self.in_flight or self.permits or room.taken() or self.server.server_state.tasks)
        )


@contextlib.asynccontextmanager
async def serve(
    *engines: FakeEngine, raw: bool = True, options: dict[str, Any] | None = None
) -> AsyncIterator[Running]:
    document = {
        "host": "127.0.0.1",
        "port": 0,
        "backends": [{"url": engine.url} for engine in engines],
        "shutdownDelay": "0s",
        "drainTimeout": "0s",
    }
    gateway = Gateway(Settings.model_validate(document | (options or {})))
    server = (QuietServer if raw else PlainServer)(gateway)
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(gateway, server, port)
    finally:
        server.should_exit = True
        await task


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(params=["raw", "asgi"])
def gateway(request: pytest.FixtureRequest) -> Serve:
    """`async with gateway(engine, options={...}) as running:`, once for each channel."""

    def start(*engines: FakeEngine, **options: Any) -> AbstractAsyncContextManager[Running]:
        return serve(*engines, raw=request.param == "raw", **options)

    return start


@pytest.fixture
def raw_gateway() -> Serve:
    """As `gateway`, with the channel that ships: for what uvicorn's own protocol does not do."""
    return serve


class Kept(logging.Handler):
    """The messages of what was logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def nothing_is_left_to_the_loop() -> Iterator[None]:
    """asyncio reports exceptions of callbacks, and those of tasks and futures that nobody asked for."""
    kept, logger = Kept(), logging.getLogger("asyncio")
    logger.addHandler(kept)
    yield
    logger.removeHandler(kept)
    assert not kept.messages


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that ships."""
    return {"uvloop": uvloop.new_event_loop}
