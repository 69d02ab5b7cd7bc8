"""A uvicorn server that rests while nothing comes.

uvicorn's own looks ten times a second whether it should end, which was most of what an idle gateway, with its
two servers, took of a processor. This one is told.
"""

from __future__ import annotations

import asyncio
import contextlib

import uvicorn

_TICK_SECONDS = 1.0
_DATES = 0  # the number of a tick, of uvicorn's ten a second, that renews the date which answers carry


class RestingServer(uvicorn.Server):
    """`should_exit` may be set from any thread."""

    _exit = False
    _told: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop

    @property
    def should_exit(self) -> bool:
        return self._exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._exit, told = value, self._told
        if value and told is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(told.set)

    async def main_loop(self) -> None:
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        while not await self.on_tick(_DATES):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._told.wait()
        self._told = None
