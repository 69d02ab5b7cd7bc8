"""Time for tests: a clock that stands still until it is told to go on, and waiting for real events."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class FakeClock:
    """A clock that stands still until `advance`; sleepers wake in the order of their time."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.time)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.Event()
        self._sleepers.append((self.time + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        """Step by step, each sleeper at its own time, and everything that follows from it at once."""
        end = self.time + seconds
        await settle()
        while due := [item for item in self._sleepers if item[0] <= end]:
            moment, woken = min(due, key=lambda item: item[0])
            self._sleepers.remove((moment, woken))
            self.time = max(self.time, moment)
            woken.set()
            await settle()
        self.time = end
        await settle()


async def settle() -> None:
    """Lets everything run that can run without time passing."""
    for _ in range(30):
        await asyncio.sleep(0)


async def eventually(probe: Callable[[], T], what: str = "", seconds: float = 30) -> T:
    """The first true answer of `probe`; AssertionError if there is none in so many real seconds."""
    try:
        async with asyncio.timeout(seconds):
            while not (found := probe()):  # noqa: ASYNC110  the probe looks at what has no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what or probe}") from None
    return found
