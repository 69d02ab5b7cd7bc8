"""What keys have used in a minute, counted in this process.

limits' memory store does the same in some five times the steps, and looks through all keys after every hit.
Through a server limits counts (policy.rates).
"""

from __future__ import annotations

import time
from collections.abc import Callable

MINUTE = 60.0
Clock = Callable[[], float]


class SlidingMinute:
    """At most so many in any minute: of the one before counts the part that is less than a minute ago, as if
    it had been even (limits' sliding window counter, which the shared counts are too).
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._minute = 0.0
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def hit(self, name: str, most: int, cost: int = 1) -> bool:
        """Counts, if there is room for it."""
        if self._used(name) + cost > most:
            return False
        self._now[name] = self._now.get(name, 0) + cost
        return True

    def test(self, name: str, most: int) -> bool:
        """Whether there is room for one."""
        return self._used(name) < most

    def seconds_left(self, name: str) -> float:
        """Until something is free again."""
        left = self._turn()
        waits = [left] if name in self._now else []
        if name in self._before:
            waits.append(left % (MINUTE / self._before[name]))
        return min(waits, default=0.0)

    def __len__(self) -> int:
        return len(self._now | self._before)

    def _used(self, name: str) -> int:
        left = self._turn()
        return int(self._before.get(name, 0) * left / MINUTE + self._now.get(name, 0))

    def _turn(self) -> float:
        """Begins another minute where it is time for it. Returns the seconds until the next one."""
        minute, past = divmod(self._clock(), MINUTE)
        if minute != self._minute:
            self._before = self._now if minute == self._minute + 1 else {}
            self._now, self._minute = {}, minute
        return MINUTE - past


class FixedMinute:
    """So many in the minute that begins with the first; the one that goes over is counted whole."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._used: dict[str, tuple[float, int]] = {}  # when its minute ends, what it has used
        self._sweep_at = 0.0

    def hit(self, name: str, most: int, cost: int = 1) -> bool:
        """Counts, and says whether that was within the limit."""
        now = self._clock()
        ends, used = self._used.get(name, (0.0, 0))
        if ends <= now:
            ends, used = now + MINUTE, 0
            self._sweep(now)
        self._used[name] = (ends, used + cost)
        return used + cost <= most

    def test(self, name: str, most: int) -> bool:
        """Whether something is left."""
        ends, used = self._used.get(name, (0.0, 0))
        return used < most or ends <= self._clock()

    def seconds_left(self, name: str) -> float:
        """Until the minute ends."""
        return max(0.0, self._used.get(name, (0.0, 0))[0] - self._clock())

    def __len__(self) -> int:
        return len(self._used)

    def _sweep(self, now: float) -> None:
        """Forgets minutes that are over, once in a while."""
        if now >= self._sweep_at:
            self._sweep_at = now + MINUTE
            self._used = {name: entry for name, entry in self._used.items() if entry[0] > now}
