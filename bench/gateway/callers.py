"""The callers of the benchmark: `callers.py PORT PATH STREAMS SECONDS` opens streams and prints what came."""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

BODIES = {
    "/chat/stream": {"message": "hi"},
    "/v1/chat/completions": {
        "model": "bench",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
    },
}


class Caller(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._request = request
        self._tail = b""
        self._started = 0.0
        self.first: float | None = None
        self.complete = False
        self.done = self._loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._started = self._loop.time()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.first is None and b"data: " in data:
            self.first = self._loop.time() - self._started
        self._tail = (self._tail + data)[-2000:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self.complete = b"[DONE]" in self._tail or b'"done": true' in self._tail
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def one(port: int, request: bytes, delay: float) -> Caller:
    await asyncio.sleep(delay)
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: Caller(request), "127.0.0.1", port)
    await caller.done
    return caller


async def main(port: int, path: str, streams: int, spread: float) -> None:
    body = json.dumps(BODIES[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    delays = (spread * number / streams for number in range(streams))
    callers = await asyncio.gather(*(one(port, request, delay) for delay in delays))
    first = sorted(caller.first or 0.0 for caller in callers)
    report = {
        "complete": sum(caller.complete for caller in callers),
        "first_p50": first[len(first) // 2],
        "first_p99": first[int(len(first) * 0.99)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
