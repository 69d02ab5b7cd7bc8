"""A gateway as a person or Kubernetes runs it: a process that listens, gets signals and has a size."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from engine import FakeEngine
from http_caller import get, until
from own_port import OwnPort

PYTHON_SECONDS = 30.0


class Process:
    """`log` is the file of what it said; sizes are of this process alone, in bytes."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, management: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.management = management
        self.log = log

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ctrl_c(self) -> None:
        """As a terminal does it: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    async def ended(self, seconds: float = 10.0) -> int:
        return await asyncio.wait_for(self.process.wait(), seconds)

    def lines(self, message: str) -> list[dict[str, Any]]:
        """The log's lines with this message."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["message"] == message]

    def resident(self) -> int:
        return self._memory("VmRSS")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most that was resident since the start, or since `forget_peak`."""
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024


async def answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        return (await get(port, path)).status == 200
    return False


@contextlib.asynccontextmanager
async def started_process(
    folder: Path, engine: FakeEngine, *, stdout: int | None = None, **settings: Any
) -> AsyncIterator[Process]:
    """A process group of its own, as a terminal makes one; it may not serve yet. What it says goes to the
    log's file, or to the file descriptor `stdout`.
    """
    ports = OwnPort(), OwnPort()
    port, management = (own.number for own in ports)
    config, log = folder / "gateway.yaml", folder / "gateway.log"
    config.write_text(
        json.dumps({"host": "127.0.0.1", "port": port, "managementPort": management} | settings)
    )
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_gateway", "--config-file", str(config), "--vllm-url", engine.url,
            env={**os.environ, "VLLM_URL": "", "CONFIG_FILE": ""}, stdout=stdout or output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield Process(process, port, management, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def running_process(
    folder: Path, engine: FakeEngine, *, ready: str = "/health", stdout: int | None = None, **settings: Any
) -> AsyncIterator[Process]:
    """Serves when the block begins: `ready`, if it begins with `:`, is asked on the management port."""
    async with started_process(folder, engine, stdout=stdout, **settings) as process:
        asked = process.management if ready.startswith(":") else process.port
        await until(lambda: answers(asked, ready.removeprefix(":")), PYTHON_SECONDS)
        yield process
