"""The floor: `splice.py PORT UPSTREAM` passes bytes between two sockets on uvloop and does nothing else.

It dials the source for each connection and reads no HTTP, so that it shows what Python's event loop costs
before a gateway has done any of its work.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop


class Engine(asyncio.Protocol):
    def __init__(self, caller: asyncio.Transport) -> None:
        self._caller = caller

    def data_received(self, data: bytes) -> None:
        self._caller.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._caller.close()


class Caller(asyncio.Protocol):
    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._request = b""
        self._engine: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._dialled = asyncio.ensure_future(self._dial())

    def data_received(self, data: bytes) -> None:
        if self._engine is not None:
            self._engine.write(data)
        else:
            self._request += data

    def connection_lost(self, _: Exception | None) -> None:
        if self._engine is not None:
            self._engine.abort()

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        engine, _ = await loop.create_connection(lambda: Engine(self._transport), "127.0.0.1", self._upstream)
        self._engine = engine
        engine.write(self._request)


async def main(port: int, upstream: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Caller(upstream), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
