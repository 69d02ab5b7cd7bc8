"""`GET /health` for load balancers, and the management port: /metrics, /livez, /readyz, /load."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import uvicorn
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from vllm_gateway.web.channel import Receive, Scope, Send
from vllm_gateway.web.models import ModelState, states
from vllm_gateway.web.resting import RestingServer
from vllm_gateway.web.services import Services

_STUCK_SECONDS = 30.0
_NOBODY = (0, 0.0)


class Health(BaseModel):
    """`starting` until the list of models is known once; `draining` after SIGTERM."""

    status: Literal["ok", "starting", "draining"]
    models: list[ModelState]
    notes: list[str]


def health_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", operation_id="health", responses={503: {"model": Health}})
    async def health(request: Request, response: Response) -> Health:
        """Whether this gateway should get requests, and the models behind it. 503 while it drains."""
        table = services.admission.public_view(services.table(), dict(request.headers.raw))
        draining = services.lifecycle.draining
        if draining:
            response.status_code = 503
        status: Literal["ok", "starting", "draining"] = "ok" if table.complete else "starting"
        shown = states(table)
        return Health(status="draining" if draining else status, models=shown.models, notes=shown.notes)

    return router


Answer = tuple[int, str, bytes]


class Management:
    """The ASGI application of the management port. It runs in a thread of its own, so that a busy request
    loop neither delays a probe nor hides its own hanging: `/livez` fails when that loop stopped.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._routes: dict[str, Callable[[], Answer]] = {
            "/metrics": self._metrics,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/load": self._load,
        }

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        route = self._routes.get(scope["path"])
        await respond(scope, send, text_page(404, "not found") if route is None else route())

    def _metrics(self) -> Answer:
        return 200, CONTENT_TYPE_LATEST, generate_latest(self._services.metrics.registry)

    def _livez(self) -> Answer:
        silent = time.monotonic() - self._services.lifecycle.beat
        return (
            text_page(200, "ok") if silent < _STUCK_SECONDS else text_page(503, f"stuck for {silent:.0f} s")
        )

    def _readyz(self) -> Answer:
        if self._services.lifecycle.draining:
            return text_page(503, "draining")
        table = self._services.table()
        if table.complete and not self._services.lifecycle.listening:
            return text_page(503, "starting")
        return (
            text_page(200, "ok") if table.complete else text_page(503, "; ".join(table.notes) or "starting")
        )

    def _load(self) -> Answer:
        return 200, "application/json", json.dumps(load_report(self._services)).encode()


def load_report(services: Services) -> dict[str, Any]:
    """What the operator scales by. `started_at` is Unix time; a young gateway knows little of idleness.

    `idle_seconds` of a model that never had a request here count from when this gateway first knew it.
    """
    load = services.engines.load
    by_model, by_endpoint = load.snapshot()
    queued = {key: waiting for key, waiting in services.queues.snapshot().items() if waiting[0]}
    models = {
        key: {
            "in_flight": by_model.get(key, 0),
            "queued": queued.get(key, _NOBODY)[0],
            "oldest_queued_seconds": round(queued.get(key, _NOBODY)[1], 3),
            "idle_seconds": 0.0 if key in queued else load.idle_seconds(key),
            "endpoints": {end.id: by_endpoint.get(end.id, 0) for end in model.endpoints},
        }
        for key, model in services.table().models.items()
    }
    lifecycle = services.lifecycle
    return {"started_at": lifecycle.started_at, "draining": lifecycle.draining, "models": models}


async def respond(scope: Scope, send: Send, answer: Answer) -> None:
    """Sends a page of the management port, to who asks with GET or HEAD."""
    status, kind, body = answer if scope["method"] in ("GET", "HEAD") else text_page(405, "use GET")
    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def text_page(status: int, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", text.encode() + b"\n"


def management_server(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> uvicorn.Server:
    """What serves a management port, of one gateway or of several workers."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    return RestingServer(config)
