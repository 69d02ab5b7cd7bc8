"""Writes manifests as fast as the API server takes them, in a process of its own.

It creates the models that the operator under test sees, and it is the yardstick: the same children, written
by a bare loop with the operator's own client and as many requests at once. Its input is one line of JSON,
then a line `go`; it answers `ready` when connected and `done` at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from programs import BenchError

from vllm_operator.cluster import Cluster, connect
from vllm_operator.kinds import Body, Kind, key_of, uid_of

LINE_LIMIT = 1 << 26  # bytes of input


class Writer:
    """A started process; `go()` lets it write and returns when everything is written."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def go(self) -> None:
        await self.say("go", "done")

    async def say(self, line: str, answer: str) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n".encode())
        await self._process.stdin.drain()
        heard = (await self._process.stdout.readline()).decode().strip()
        if heard != answer:
            raise BenchError(f"the writer ended early: {heard or 'see its error above'}")


@asynccontextmanager
async def writer(
    verb: str, groups: list[list[Body]], kinds: list[Kind], workers: int, kubeconfig: Path | None = None
) -> AsyncIterator[Writer]:
    """`groups`: each is written in order by one of the workers. `kinds` are those of the bodies."""
    environment = {**os.environ, **({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})}
    plurals = {kind.kind: kind.plural for kind in kinds}
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, stdin=PIPE, stdout=PIPE, env=environment
    )
    started = Writer(process)
    order = json.dumps({"verb": verb, "workers": workers, "plurals": plurals, "groups": groups})
    try:
        await started.say(order, "ready")
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def write(cluster: Cluster, verb: str, kind: Kind, body: Body) -> None:
    match verb:
        case "create":
            await cluster.create(kind, body)
        case "apply":
            await cluster.apply(kind, body, uid=uid_of(body))
        case _:
            await cluster.delete(kind, key_of(body), uid=uid_of(body))


async def work(cluster: Cluster, order: dict[str, Any], groups: Iterator[list[Body]]) -> None:
    for group in groups:  # shared by all workers
        for body in group:
            kind = Kind(body["apiVersion"], body["kind"], order["plurals"][body["kind"]])
            await write(cluster, order["verb"], kind, body)


async def main() -> None:
    order = json.loads(sys.stdin.readline(LINE_LIMIT))
    async with await connect() as client:
        cluster = Cluster(client)
        print("ready", flush=True)
        sys.stdin.readline()
        groups = iter(order["groups"])
        await asyncio.gather(*(work(cluster, order, groups) for _ in range(order["workers"])))
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
