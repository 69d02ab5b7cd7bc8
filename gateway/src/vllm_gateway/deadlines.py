"""Time limits that nearly nobody reaches, for many at once."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Late(Protocol):
    """Who may be late for something. It is hashed by identity."""

    def too_late(self) -> None: ...


class Deadlines:
    """One time limit, and all who are under it, first come first due.

    The loop has one timer for all of them, since a timer of its own for each request, made to be cancelled,
    is a good part of what a small request costs. It wakes up once in `seconds` while anybody is waited for.
    """

    __slots__ = ("_due", "_loop", "_seconds", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._due: dict[Late, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, who: Late) -> None:
        """From now on; not twice without an `end` between."""
        self._due[who] = due = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def end(self, who: Late) -> None:
        """In time, or not waited for; safe to call twice."""
        self._due.pop(who, None)

    def _look(self) -> None:
        now, self._timer = self._loop.time(), None
        while self._due:
            who, due = next(iter(self._due.items()))
            if due > now:
                self._timer = self._loop.call_at(due, self._look)
                return
            del self._due[who]
            who.too_late()


class Limits:
    """Time limits by their seconds, of which settings and models have few different ones."""

    def __init__(self) -> None:
        self._all: dict[float, Deadlines] = {}

    def of(self, seconds: float) -> Deadlines:
        limit = self._all.get(seconds)
        if limit is None:
            limit = self._all[seconds] = Deadlines(asyncio.get_running_loop(), seconds)
        return limit
