"""The upstream of the benchmark: `source.py PORT EVENTS SECONDS` streams canned vLLM events to every request.

It does as little as it can, so that the machine's time goes to the proxy that is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

HEAD = (
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


MODELS = json.dumps({"object": "list", "data": [{"id": "bench", "object": "model"}]}).encode()
USAGE = {"prompt_tokens": 9, "total_tokens": 109, "completion_tokens": 100}
FIRST = event(part({"role": "assistant", "content": ""}))
TOKEN = event(part({"content": " token"}))
LAST = (
    event(part({"content": ""}, "stop"))
    + event(part({}) | {"choices": [], "usage": USAGE})
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


class Source(asyncio.Protocol):
    def __init__(self, events: int, seconds: float) -> None:
        self._events = events
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
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
            fields = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(MODELS)
            self._transport.write(b"HTTP/1.1 200 OK\r\n" + fields + MODELS)
        elif len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._buffer = b""
            self._transport.write(HEAD + FIRST)
            self._next(self._events - 1, self._loop.time() + self._seconds)

    def _next(self, left: int, due: float) -> None:
        if self._transport.is_closing():
            return
        if left <= 1:
            self._transport.write(LAST)
            return
        self._transport.write(TOKEN)
        self._loop.call_at(due, self._next, left - 1, due + self._seconds)


async def main(port: int, events: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Source(events, seconds), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
