"""Standard output, written by a thread of its own: who reads it may stop for a while.

A container's runtime does when its disk is full or slow, and a loop that waited for it would hold up every
stream. So lines wait here, up to a bound; those over it are lost, and counted in a line once there is room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue

_LOG = logging.getLogger("vllm_gateway.output")
_MOST = 4 * 1024 * 1024  # bytes
_CLOSE_SECONDS = 2.0


class Output:
    """A text stream for loggers, on the file descriptor `number`. Writing never waits and never raises."""

    def __init__(self, number: int, most: int = _MOST) -> None:
        self._number = number
        self._most = most
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._held = self._lost = 0
        # Not sys.stdout's buffer, whose lock a thread that waits would still have when Python ends.
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Whole lines, each with its end."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._held + len(data) > self._most:
                self._lost += data.count(b"\n")
                return
            self._held += len(data)
        self._waiting.put(data)

    def flush(self) -> None:
        """The thread does not wait for it."""

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Waits for the last lines to be written, for so long."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        ending = False
        while not (ending and self._waiting.empty()):
            data = self._waiting.get()
            if data is None:
                ending, data = True, b""
            with contextlib.suppress(OSError):  # nobody reads any more: no reason to refuse requests
                _write_all(self._number, data)
            self._written(len(data), ending=ending)

    def _written(self, size: int, *, ending: bool) -> None:
        with self._lock:
            self._held -= size
            lost = self._lost if ending or self._held <= self._most // 2 else 0
            self._lost -= lost
        if lost:
            _LOG.warning("log lines lost", extra={"fields": {"lines": lost}})


def _write_all(number: int, data: bytes) -> None:
    """Whole lines with each call, so that those of several processes on one pipe are not mixed (pipe(7))."""
    while data:
        end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or data.find(b"\n") + 1
        piece, data = data[:end], data[end:]
        while piece:
            piece = piece[os.write(number, piece) :]


@contextlib.contextmanager
def own_thread() -> Iterator[Output]:
    """What the loggers write to standard output goes through an Output meanwhile."""
    sys.stdout.flush()
    output = Output(sys.stdout.fileno())
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
    ]
    for handler in handlers:
        handler.setStream(output)
    try:
        yield output
    finally:
        for handler in handlers:
            handler.setStream(sys.stdout)
        output.close()
