"""The callers of the benchmark: `callers.py JSON` opens what the JSON says and prints what came, as JSON.

{"port", "path", "key", "model", "streams", "events", "spread"} opens streams over `spread` seconds;
{"port", "path", "key", "model", "connections", "seconds"} sends unary requests, one after another on each.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import uvloop

TOKEN = b'" token"'


class Caller(asyncio.Protocol):
    """One stream. What comes is kept as it is and looked at when all is over."""

    def __init__(self, request: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._request = request
        self._pieces: list[bytes] = []
        self._started = 0.0
        self.times: list[float] = []
        self.done = self._loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._started = self._loop.time()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self.times.append(time.monotonic())
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def complete(self, events: int) -> bool:
        """Every token and the terminator have come."""
        body = b"".join(self._pieces)
        end = b"[DONE]" in body or b'"done": true' in body
        return end and body.count(TOKEN) == max(0, events - 2)

    def first(self) -> float:
        """Seconds from the connection to the first byte of a body; an hour if none came."""
        at = 1 if len(self.times) > 1 and b"data: " not in self._pieces[0] else 0
        return self.times[at] - self._started if self.times else 3600.0

    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]


class UnaryCaller(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, request: bytes, until: float) -> None:
        self._request = request
        self._until = until
        self._buffer = b""
        self.answered = 0
        self.wrong = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if b" token" not in self._buffer or not self._buffer.endswith((b"}", b"}\r\n0\r\n\r\n")):
            return
        self.answered += 1
        self.wrong += not self._buffer.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        if time.monotonic() < self._until:
            self._transport.write(self._request)
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def request_of(load: dict[str, Any], *, stream: bool) -> bytes:
    options = {"model": load["model"], "max_tokens": load.get("events", 20)}
    if load["path"].startswith("/chat"):
        body = json.dumps(options | {"message": "hi"}).encode()
    else:
        messages = [{"role": "user", "content": "hi"}]
        body = json.dumps(options | {"messages": messages, "stream": stream}).encode()
    head = f"POST {load['path']} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    auth = f"authorization: Bearer {load['key']}\r\n"
    return f"{head}{auth}content-length: {len(body)}\r\n\r\n".encode() + body


def at(share: float, values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def one(port: int, request: bytes, delay: float) -> Caller:
    await asyncio.sleep(delay)
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: Caller(request), "127.0.0.1", port)
    await caller.done
    return caller


async def streams(load: dict[str, Any]) -> dict[str, float]:
    number, request = load["streams"], request_of(load, stream=True)
    delays = (load["spread"] * index / number for index in range(number))
    callers = await asyncio.gather(*(one(load["port"], request, delay) for delay in delays))
    first = [caller.first() for caller in callers]
    gaps = [gap for caller in callers for gap in caller.gaps()]
    complete = sum(caller.complete(load["events"]) for caller in callers)
    return {
        "complete": complete,
        "first_p50": at(0.5, first),
        "first_p99": at(0.99, first),
        "gap_p99": at(0.99, gaps),
    }


async def unary(load: dict[str, Any]) -> dict[str, float]:
    loop, request = asyncio.get_running_loop(), request_of(load, stream=False)
    until = time.monotonic() + load["seconds"]
    callers = []
    for _ in range(load["connections"]):
        _, caller = await loop.create_connection(
            lambda: UnaryCaller(request, until), "127.0.0.1", load["port"]
        )
        callers.append(caller)
    await asyncio.wait([caller.done for caller in callers])
    return {
        "answered": sum(caller.answered for caller in callers),
        "wrong": sum(caller.wrong for caller in callers),
    }


if __name__ == "__main__":
    gc.disable()  # a collection here would pass for a pause of the proxy
    given = json.loads(sys.argv[1])
    started = time.process_time()
    result = uvloop.run(unary(given) if "connections" in given else streams(given))
    print(json.dumps(result | {"cpu": time.process_time() - started}))
