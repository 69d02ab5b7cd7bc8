"""What every route needs, passed by hand: no globals, so that a test can run two gateways side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_gateway.policy.admission import Admission
from vllm_gateway.policy.cache import Store
from vllm_gateway.policy.queue import Queues
from vllm_gateway.policy.room import Room
from vllm_gateway.routing.table import Table
from vllm_gateway.settings import Settings
from vllm_gateway.telemetry import Metrics
from vllm_gateway.tracing import Tracing
from vllm_gateway.upstream.attempt import Engines
from vllm_gateway.upstream.template import Templates
from vllm_gateway.web.openai import Fingerprints
from vllm_gateway.web.records import Records

CALLER = "vllm_gateway.caller"  # where the scope of a FastAPI route has the caller


@dataclass(slots=True)
class Lifecycle:
    """Where the process is in its life. `beat` is when the request loop last ran (monotonic seconds)."""

    started_at: float = field(default_factory=time.time)
    listening: bool = False
    draining: bool = False
    beat: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Services:
    """`table` returns the table in force: a request asks once and keeps what it got."""

    settings: Settings
    table: Callable[[], Table]
    engines: Engines
    admission: Admission
    queues: Queues
    room: Room
    answers: Store
    metrics: Metrics
    records: Records
    lifecycle: Lifecycle
    tracing: Tracing | None = None
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    templates: Templates = field(default_factory=Templates)
