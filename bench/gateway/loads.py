"""The loads, and what one run of one of them at one proxy gives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proxies import HERE, KEY, Target, cpu_seconds, resident_bytes

_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Load:
    """So many streams, begun within `spread` seconds, of so many events each."""

    name: str
    streams: int
    events: int
    spread: float
    pace: str = "10ms"


@dataclass(frozen=True)
class Run:
    """Seconds everywhere. `cpu` and `memory` (bytes, over what it was before) are the proxy's."""

    cpu: float
    memory: int
    complete: int
    first_p50: float
    first_p99: float
    gap_p99: float


@dataclass(frozen=True)
class UnaryRun:
    """Requests answered by 32 connections, and the proxy's CPU seconds for each."""

    per_second: float
    cpu_each: float


# The many streams come first: what they hold shows only in a process that has not held as much before.
MANY = Load("1,000 streams of 50 events", 1000, 50, 2.0, "100ms")
ONE = Load("1 event", 500, 1, 2.5)
HUNDRED = Load("100 streams of 100 events", 100, 100, 1.0)
LONG = Load("100 streams of 500 events", 100, 500, 1.0)
THREE_HUNDRED = Load("300 streams of 100 events", 300, 100, 1.0)
BURST = Load("300 streams at once", 300, 20, 0.0)
ALL = (MANY, ONE, HUNDRED, LONG, THREE_HUNDRED, BURST)
WARM_UP = Load("warm-up", 20, 10, 0.2)
_CONNECTIONS = 32


def _callers(target: Target, options: dict[str, object]) -> dict[str, float]:
    given = json.dumps({"port": target.port, "key": KEY, **options})
    command = [sys.executable, str(HERE / "callers.py"), given]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def run(target: Target, load: Load) -> Run:
    options: dict[str, object] = {"streams": load.streams, "events": load.events, "spread": load.spread}
    before, memory = cpu_seconds(target.pid), resident_bytes(target.pid)
    with _peak(target.pid) as peak:
        came = _callers(target, options | {"path": target.path, "model": f"bench-{load.pace}"})
    return Run(
        cpu_seconds(target.pid) - before,
        max(peak) - memory,
        int(came["complete"]),
        came["first_p50"],
        came["first_p99"],
        came["gap_p99"],
    )


def run_unary(target: Target, seconds: float) -> UnaryRun:
    before = cpu_seconds(target.pid)
    options: dict[str, object] = {"connections": _CONNECTIONS, "seconds": seconds, "path": target.unary}
    came = _callers(target, options | {"model": "bench-10ms"})
    if came["wrong"]:
        sys.exit(f"{target.name} refused {came['wrong']:.0f} requests")
    return UnaryRun(came["answered"] / seconds, (cpu_seconds(target.pid) - before) / came["answered"])


@contextmanager
def _peak(pid: int | None) -> Iterator[list[int]]:
    """The resident size of a process, sampled until the exit."""
    samples, stop = [resident_bytes(pid)], threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            samples.append(resident_bytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
