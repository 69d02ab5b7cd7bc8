"""An event loop whose clock a test turns by hand, so that a wait of ten minutes takes none.

loop = VirtualLoop()
loop.advance(5)      # everything that was due within five seconds has run, in order
"""

from __future__ import annotations

import asyncio


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks only inside `advance` and `settle`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Runs what is ready, and what that makes ready."""
        for _ in range(5):
            self.run_until_complete(asyncio.sleep(0))

    def advance(self, seconds: float) -> None:
        """Turns the clock, stopping at each timer on the way."""
        until = self.now + seconds
        self.settle()
        while (timer := self._next_timer()) is not None and timer <= until:
            self.now = max(self.now, timer)
            self.settle()
        self.now = until
        self.settle()

    def _next_timer(self) -> float | None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return min((timer.when() for timer in timers if not timer.cancelled()), default=None)
