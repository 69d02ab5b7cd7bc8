"""Which model is worked on when: one reconcile per key at a time, doubles folded, failures retried for ever.

A key that is added while it is worked on is worked on once more afterwards. A reconcile that raises is tried
again after a growing, capped wait; one that returns seconds is called again after them. Keys for which people
wait most go before the others, which keep a share of the turns.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from vllm_operator.backoff import Backoff
from vllm_operator.clock import Clock
from vllm_operator.errors import ApiError

K = TypeVar("K", bound=Hashable)
log = logging.getLogger(__name__)

Work = Callable[[K], Awaitable[float | None]]
SHARE = 16  # one turn in so many is for those without precedence, while there are others


class Line(Generic[K]):
    """Who waits, each key once and in order of arrival. `precedes` is asked when a key comes; without
    precedence a key waits for longer, but never for ever.
    """

    def __init__(self, precedes: Callable[[K], bool]) -> None:
        self.precedes = precedes
        self._first: dict[K, None] = {}
        self._rest: dict[K, None] = {}
        self._turns = 0

    def __len__(self) -> int:
        return len(self._first) + len(self._rest)

    @property
    def first(self) -> int:
        """How many have precedence."""
        return len(self._first)

    def add(self, key: K) -> None:
        if self.precedes(key):
            self._rest.pop(key, None)
            self._first[key] = None
        elif key not in self._first:
            self._rest[key] = None

    def take(self) -> K:
        """Whose turn it is; somebody must wait."""
        if self._first and self._rest:
            self._turns += 1
        shared = self._rest and self._turns % SHARE == 0
        chosen = self._first if self._first and not shared else self._rest
        key = next(iter(chosen))
        del chosen[key]
        return key


class Queue(Generic[K]):
    """`work(key)` returns the seconds after which it wants to be called again, or None."""

    def __init__(
        self,
        work: Work[K],
        clock: Clock,
        *,
        concurrency: int = 8,
        backoff: Backoff | None = None,
        precedes: Callable[[K], bool] = lambda _key: False,
    ) -> None:
        self._work, self._clock, self._concurrency = work, clock, concurrency
        self._backoff = backoff or Backoff(first=0.2, cap=60)
        self._ready = Line(precedes)
        self._running: dict[asyncio.Task[None], K] = {}
        self._again: set[K] = set()
        self._due: dict[K, float] = {}  # the earliest time that a key waits for
        self._timers: list[tuple[float, int, K]] = []
        self._serial = 0
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait or are worked on."""
        return len(self._ready) + len(self._running)

    @property
    def preceding(self) -> int:
        """Keys with precedence that wait, or are worked on and have not lost it yet."""
        return self._ready.first + sum(map(self._ready.precedes, self._running.values()))

    def add(self, key: K) -> None:
        if key in self._running.values():
            self._again.add(key)
        else:
            self._ready.add(key)
            self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """At the latest after so many seconds; an earlier appointment stands."""
        due = self._clock.monotonic() + seconds
        if key not in self._due or due < self._due[key]:
            self._due[key] = due
            self._serial += 1
            heapq.heappush(self._timers, (due, self._serial, key))
            self._changed.set()

    async def run(self) -> None:
        """Works until cancelled; what is being worked on then is cancelled and awaited."""
        try:
            while True:
                self._changed.clear()
                self._wake_due()
                self._start()
                await self._wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _wake_due(self) -> None:
        now = self._clock.monotonic()
        while self._timers and self._timers[0][0] <= now:
            due, _, key = heapq.heappop(self._timers)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)

    def _start(self) -> None:
        while self._ready and len(self._running) < self._concurrency:
            key = self._ready.take()
            task = asyncio.create_task(self._attempt(key), name=f"reconcile {key}")
            self._running[task] = key
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        key = self._running.pop(task)
        if key in self._again:
            self._again.discard(key)
            self._ready.add(key)
        self._changed.set()

    async def _wait(self) -> None:
        """Until something changed or the next appointment is due."""
        waits = [asyncio.create_task(self._changed.wait())]
        if self._timers:
            pause = max(0.0, self._timers[0][0] - self._clock.monotonic())
            waits.append(asyncio.create_task(self._clock.sleep(pause)))  # type: ignore[arg-type]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    async def _attempt(self, key: K) -> None:
        try:
            again = await self._work(key)
        except Exception as error:  # noqa: BLE001  one model's trouble must not end the others' work
            self._failed(key, error)
        else:
            self._failures.pop(key, None)
            if again is not None:
                self.add_after(key, again)

    def _failed(self, key: K, error: Exception) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        wait = self._backoff.after(failures)
        if isinstance(error, ApiError):
            wait = max(wait, error.retry_after or 0.0)
        facts = {
            "model": str(key),
            "failures": failures,
            "retry_seconds": round(wait, 1),
            "error": str(error),
        }
        log.warning("reconcile failed", extra=facts, exc_info=None if isinstance(error, ApiError) else error)
        self.add_after(key, wait)
