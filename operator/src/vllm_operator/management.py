"""The management port: /metrics, /livez and /readyz, on the aiohttp that the Kubernetes client brings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from vllm_operator.errors import SettingsError

Health = Callable[[], str]  # "" when healthy, else why not


@asynccontextmanager
async def serve(
    host: str, port: int, *, metrics: Callable[[], bytes], live: Health, ready: Health
) -> AsyncIterator[int]:
    """Yields the port in use. Raises SettingsError where it cannot be had."""

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(
            body=metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/livez", _probe(live))
    app.router.add_get("/readyz", _probe(ready))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host or None, port).start()
        except OSError as error:
            raise SettingsError(
                f"managementPort: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _probe(health: Health) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def probe(_request: web.Request) -> web.Response:
        trouble = health()
        return web.Response(status=503 if trouble else 200, text=f"{trouble or 'ok'}\n")

    return probe
