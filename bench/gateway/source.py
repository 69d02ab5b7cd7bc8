"""The upstream of the benchmark: `source.py PORT` answers as vLLM does, from prepared bytes.

A request's `max_tokens` is the number of events of its stream, and its model's name says how far they are
apart (`bench-10ms`). Streams of one pace stand in one queue, which is in the order of their next events: one
timer serves all of them, so that the machine's time goes to the proxy that is measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections import deque

import uvloop

MODELS = ("bench-10ms", "bench-100ms")
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(document: object) -> bytes:
    return chunk(b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n")


def part(delta: dict[str, str], reason: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "token_ids": None}
    head = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk"}
    return head | {"created": 1790000000, "model": "bench", "choices": [choice]}


def answer(document: object) -> bytes:
    body = json.dumps(document).encode()
    fields = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return b"HTTP/1.1 200 OK\r\n" + fields + body


_USAGE = {"prompt_tokens": 9, "total_tokens": 109, "completion_tokens": 100}
_FIRST = event(part({"role": "assistant", "content": ""}))
_TOKEN = event(part({"content": " token"}))
_LAST = (
    event(part({"content": ""}, "stop"))
    + event(part({}) | {"choices": [], "usage": _USAGE})
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
_LIST = answer({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})
_MESSAGE = {"index": 0, "message": {"role": "assistant", "content": " token" * 20}, "finish_reason": "stop"}
_WHOLE = answer({"id": "chatcmpl-0", "object": "chat.completion", "choices": [_MESSAGE], "usage": _USAGE})


class Pace:
    """All streams with one interval; the first of the queue is always the next one that is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, int, asyncio.Transport]] = deque()
        self._armed = False

    def add(self, transport: asyncio.Transport, events: int) -> None:
        self._queue.append((self._loop.time() + self._seconds, events, transport))
        self._arm()

    def _arm(self) -> None:
        if self._queue and not self._armed:
            self._armed = True
            self._loop.call_at(self._queue[0][0], self._send)

    def _send(self) -> None:
        self._armed = False
        queue, now = self._queue, self._loop.time()
        while queue and queue[0][0] <= now:
            due, left, transport = queue.popleft()
            if transport.is_closing():
                continue
            transport.write(_TOKEN if left > 1 else _LAST)
            if left > 1:
                queue.append((due + self._seconds, left - 1, transport))
        self._arm()


class Source(asyncio.Protocol):
    def __init__(self, paces: dict[str, Pace]) -> None:
        self._paces = paces
        self._buffer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET "):
            self._buffer = b""
            self._transport.write(_LIST)
        elif len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._buffer = b""
            self._answer(json.loads(body))

    def _answer(self, request: dict[str, object]) -> None:
        if not request.get("stream"):
            self._transport.write(_WHOLE)
            return
        events = int(str(request["max_tokens"]))
        if events == 1:
            self._transport.write(_HEAD + _FIRST + _LAST)
        else:
            self._transport.write(_HEAD + _FIRST)
            self._paces[str(request["model"])].add(self._transport, events - 1)


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    paces = {"bench-10ms": Pace(0.01), "bench-100ms": Pace(0.1)}
    server = await loop.create_server(lambda: Source(paces), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    gc.disable()  # a collection here would pass for a pause of the proxy
    uvloop.run(main(int(sys.argv[1])))
