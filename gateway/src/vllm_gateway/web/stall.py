"""Tells a caller that reads slowly from one that does not read.

A transport says when it is full and when it is nearly empty again, and nothing between: of 60 MB a caller
may read 59 without a word. So while it is full, what waits in it is looked at a few times a `writeStall`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import struct
import termios
from collections.abc import Callable

LEAST_READ = 16 * 1024
_LOOKS = 4


class StallWatch:
    """Calls `stalled` once `unread()` has not fallen by LEAST_READ bytes for `seconds`; until `stop`.

    What is written meanwhile is no step back: little is, since whoever writes has been told to wait. Time in
    which this process itself stood still (a throttled container, a paused machine) does not count.
    """

    __slots__ = ("_due", "_loop", "_progress_at", "_seconds", "_seen", "_stalled", "_timer", "_unread")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        unread: Callable[[], int],
        stalled: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._unread = unread
        self._stalled = stalled
        self._seen = unread()
        self._progress_at = loop.time()
        self._due = self._progress_at + seconds / _LOOKS
        self._timer = loop.call_at(self._due, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now, unread = self._loop.time(), self._unread()
        self._progress_at += max(0.0, now - self._due)
        if self._seen - unread >= LEAST_READ:
            self._seen, self._progress_at = unread, now
        self._seen = max(self._seen, unread)
        if now >= self._progress_at + self._seconds:
            self._stalled()
            return
        self._due = min(now + self._seconds / _LOOKS, self._progress_at + self._seconds)
        self._timer = self._loop.call_at(self._due, self._look)


def unread_bytes(transport: asyncio.Transport) -> int:
    """What was written to a connection and not acknowledged by its peer: here and, on Linux, in the kernel.

    The kernel holds megabytes, and takes more only once a third of its buffer is free (tcp(7), SIOCOUTQ).
    """
    waiting = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or a system that cannot tell
            (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
            waiting += queued
    return waiting
