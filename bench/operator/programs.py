"""A process that is measured from outside: its CPU time and memory are the kernel's figures, not its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60


class BenchError(Exception):
    """The run cannot go on; the message is for the person who started it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Program:
    """Runs from the constructor on; its output goes to `log`. `readyz` answers 200 once it works.

    `says`: what it must have written too, where `readyz` does not tell that it waits for its Lease.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, readyz: str, says: str = ""
    ) -> None:
        self._log, self._readyz, self._says = log, readyz, says.encode()
        self.started = time.monotonic()
        with log.open("ab") as output:
            self._begin = output.tell()  # what stands before it is of an earlier process
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=output, stderr=output
            )

    async def ready(self) -> float:
        """Seconds from the start of the process until it is ready."""
        while time.monotonic() - self.started < START_SECONDS:
            if self._process.poll() is not None:
                break
            if self._has_said() and await asyncio.to_thread(_answers, self._readyz):
                return time.monotonic() - self.started
            await asyncio.sleep(0.05)
        raise BenchError(f"{self._process.args!r} did not become ready:\n{self.tail()}")

    def _has_said(self) -> bool:
        return self._says in self._log.read_bytes()[self._begin :]

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, those that have ended too: proc(5), fields 14 and 15."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mb(self, field: str = "VmHWM") -> float:
        """Resident megabytes (10^6 bytes); VmHWM is the peak, VmRSS what is used now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024 / 1e6

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
