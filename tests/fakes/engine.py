"""A scripted engine: vLLM's HTTP API over a real socket, with the faults that tests need.

    async with FakeEngine(stream(tokens=["a", "b"])) as engine: ...

A script is an async function of a `Reply`; it writes bytes at any boundary it likes, and may reset, stall or
vanish. What arrived is in `engine.seen`; `engine.active` counts the requests that are being answered and
`engine.abandoned` those whose caller left before their end.

    python tests/fakes/engine.py --port 8000 --tokens 100 --delay-ms 10

runs it by itself, as an upstream for `make run-gateway` and for the benchmarks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from own_port import OwnPort

SSE = "text/event-stream; charset=utf-8"


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """The answer to one request, written by a script."""

    request: Seen
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keep_alive: bool = True
    headers: list[str] = field(default_factory=list)

    async def head(self, status: int = 200, kind: str = SSE, *, length: int | None = None) -> None:
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {kind}", framing, *self.headers, "", ""]
        await self.raw("\r\n".join(lines).encode())

    async def chunk(self, payload: bytes) -> None:
        await self.raw(b"%x\r\n%b\r\n" % (len(payload), payload))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        if self.writer.transport.is_closing():
            raise ConnectionResetError
        self.writer.write(data)
        await self.writer.drain()

    async def json(self, document: object, status: int = 200) -> None:
        body = json.dumps(document, separators=(",", ":")).encode()
        await self.head(status, "application/json", length=len(body))
        await self.raw(body)

    def reset(self) -> None:
        """Ends the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        if sock is None or self.writer.transport.is_closing():
            raise ConnectionResetError
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        self.keep_alive = False

    def close(self) -> None:
        """Ends the connection with FIN."""
        self.writer.close()
        self.keep_alive = False

    async def until_caller_leaves(self) -> None:
        while await self.reader.read(1024):
            pass
        raise ConnectionResetError


Script = Callable[[Reply], Awaitable[None]]


class FakeEngine:
    """Serves `script` while entered, on `port` or one of its own; `GET /v1/models` always lists `models` and
    `adapters`.
    """

    def __init__(
        self, script: Script | None = None, *, models: Sequence[str] = ("m",), port: int = 0
    ) -> None:
        self.script: Script = script or stream()
        self.models = list(models)
        self.adapters: dict[str, str] = {}
        self._own = None if port else OwnPort()
        self.port = port or (self._own.number if self._own else 0)
        self.seen: list[Seen] = []
        self.active = 0
        self.abandoned = 0
        self.connections = 0
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=2048)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.accepted += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self.connections -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await _read_request(reader)
        reply = Reply(request, reader, writer)
        if request.method == "GET":
            await _listing(self.models, self.adapters, reply)
            return request.headers.get("connection") != "close"
        self.seen.append(request)
        self.active += 1
        answering = asyncio.ensure_future(self.script(reply))
        leaving = asyncio.ensure_future(_left(reader))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            # Whichever noticed first: the one that watches, or the script by its write.
            if not answering.done() or isinstance(answering.exception(), ConnectionError):
                self.abandoned += 1
                raise ConnectionResetError
            answering.result()
        finally:
            self.active -= 1
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        return reply.keep_alive


async def _left(reader: asyncio.StreamReader) -> None:
    """Until the caller closes. A caller sends nothing while it waits, so nothing is read away."""
    while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110 - StreamReader has no event for it
        await asyncio.sleep(0.005)


async def _read_request(reader: asyncio.StreamReader) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ", 2)
    pairs = (line.split(":", 1) for line in head[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(method, path, headers, body)


async def _listing(models: Sequence[str], adapters: Mapping[str, str], reply: Reply) -> None:
    card = {"object": "model", "created": 1, "owned_by": "vllm"}
    data = [{"id": name, **card, "parent": adapters.get(name)} for name in (*models, *adapters)]
    await reply.json({"object": "list", "data": data})


# What vLLM sends (0.32, measured): compact JSON, one event a chunk.


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chat_chunk(**choice: object) -> bytes:
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "logprobs": None, "finish_reason": None, **choice}],
        }
    )


ROLE = chat_chunk(delta={"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
ENGINE_DIED = event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})


def token(text: str) -> bytes:
    return chat_chunk(delta={"content": text})


def finish(reason: str = "stop") -> bytes:
    return chat_chunk(delta={"content": ""}, finish_reason=reason, stop_reason=None)


def usage(prompt: int, completion: int) -> bytes:
    counts = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event(head | {"choices": [], "usage": counts})


def chat_events(tokens: Sequence[str], *, with_usage: bool, reason: str = "stop") -> list[bytes]:
    """A whole chat stream, event by event."""
    counts = [usage(7, len(tokens))] if with_usage else []
    return [ROLE, *map(token, tokens), finish(reason), *counts, DONE]


def wants_usage(request: Seen) -> bool:
    return bool((request.json().get("stream_options") or {}).get("include_usage"))


# Scripts.


def stream(tokens: Sequence[str] = ("Hel", "lo", "!"), *, delay: float = 0.0, reason: str = "stop") -> Script:
    """A healthy engine: streams where the request says `stream`, answers whole where it does not."""

    async def script(reply: Reply) -> None:
        if not reply.request.json().get("stream"):
            await whole_answer(reply, tokens, delay)
            return
        await reply.head()
        for piece in chat_events(tokens, with_usage=wants_usage(reply.request), reason=reason):
            await reply.chunk(piece)
            if delay:
                await asyncio.sleep(delay)
        await reply.end()

    return script


async def whole_answer(reply: Reply, tokens: Sequence[str], delay: float = 0.0) -> None:
    await asyncio.sleep(delay * len(tokens))
    message = {"role": "assistant", "content": "".join(tokens)}
    counts = {"prompt_tokens": 7, "total_tokens": 7 + len(tokens), "completion_tokens": len(tokens)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    document = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice]}
    await reply.json(document | {"usage": counts})


def pieces(data: Sequence[bytes], *, pause: float = 0.002, then: str = "end") -> Script:
    """A chunked 200 whose body arrives in exactly these reads; then `end`, `reset`, `close` or `stall`."""

    async def script(reply: Reply) -> None:
        await reply.head()
        for piece in data:
            await reply.chunk(piece)
            await asyncio.sleep(pause)
        await _then(reply, then)

    return script


def raw(data: Sequence[bytes], *, pause: float = 0.002, then: str = "close") -> Script:
    """Bytes on the wire, heads included."""

    async def script(reply: Reply) -> None:
        for piece in data:
            await reply.raw(piece)
            await asyncio.sleep(pause)
        await _then(reply, then)

    return script


async def _then(reply: Reply, then: str) -> None:
    if then == "end":
        await reply.end()
    elif then == "stall":
        await asyncio.sleep(3600)
    elif then == "reset":
        reply.reset()
    elif then == "close":
        reply.close()


def forever(piece: bytes, *, first: Sequence[bytes] = (), every: float = 0.01) -> Script:
    """A stream without end, for callers that leave or do not read."""

    async def script(reply: Reply) -> None:
        await reply.head()
        for part in first:
            await reply.chunk(part)
        while True:
            await reply.chunk(piece)
            if every:
                await asyncio.sleep(every)

    return script


def answer(status: int, document: object, *, headers: Sequence[str] = ()) -> Script:
    async def script(reply: Reply) -> None:
        reply.headers.extend(headers)
        await reply.json(document, status)

    return script


async def never(reply: Reply) -> None:
    """Accepts the request and says nothing."""
    await asyncio.sleep(3600)


def in_turn(*scripts: Script) -> Script:
    """The first request gets the first script, and so on; the last goes on for ever."""
    left = list(scripts)

    async def script(reply: Reply) -> None:
        chosen = left.pop(0) if len(left) > 1 else left[0]
        await chosen(reply)

    return script


async def _main(port: int, tokens: int, delay: float) -> None:
    script = stream([" token"] * tokens, delay=delay)
    async with FakeEngine(script, models=["fake"], port=port) as engine:
        print(f"fake engine on {engine.url}", flush=True)
        await asyncio.sleep(float("inf"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A fake vLLM that streams canned tokens.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--delay-ms", type=float, default=10.0)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(options.port, options.tokens, options.delay_ms / 1000))
