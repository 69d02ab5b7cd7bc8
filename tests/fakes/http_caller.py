"""A caller that speaks HTTP/1.1 byte by byte: it reads the framing itself and can leave at any moment.

An ordinary client hides what these tests look at: where a chunk ends, whether a connection goes on, what a
reset looks like.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 5.0) -> None:
    """Waits until a condition, plain or async, is true; fails where it does not become so."""
    async with asyncio.timeout(seconds):
        while not (await found if inspect.isawaitable(found := condition()) else found):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Answer:
    """A head, and the body if it was read; header names in lower case."""

    status: int
    version: str
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """One connection to a server on the loopback interface."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, *, receive_buffer: int | None = None) -> Self:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except OSError:
            sock.close()
            raise
        return cls(*await asyncio.open_connection(sock=sock, limit=2**16))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.transport.abort()

    def send(
        self,
        path: str,
        body: object = None,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        version: str = "1.1",
    ) -> None:
        """Sends a request; a body that is not bytes goes as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields = {"host": "test", "content-type": "application/json", "content-length": str(len(data))}
        lines = [f"{method} {path} HTTP/{version}"]
        lines += [f"{name}: {value}" for name, value in (fields | (headers or {})).items() if value]
        self.raw("\r\n".join((*lines, "", "")).encode("latin-1") + data)

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> Answer:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, *_ = lines[0].split(" ")
        pairs = (line.split(":", 1) for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        return Answer(int(status), version, headers)

    async def chunk(self) -> bytes:
        """One chunk's payload; `b""` is the last. Raises IncompleteReadError where the connection breaks."""
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        payload = await self.reader.readexactly(size)
        assert await self.reader.readexactly(2) == b"\r\n"
        return payload

    async def chunks(self) -> list[bytes]:
        """Every chunk to the end of the body."""
        found = []
        while payload := await self.chunk():
            found.append(payload)
        return found

    async def answer(self) -> Answer:
        """A whole answer, whatever its framing."""
        head = await self.head()
        if head.status == 204:
            body = b""
        elif head.headers.get("transfer-encoding") == "chunked":
            body = b"".join(await self.chunks())
        elif "content-length" in head.headers:
            body = await self.reader.readexactly(int(head.headers["content-length"]))
        else:
            body = await self.reader.read(-1)
        return Answer(head.status, head.version, head.headers, body)

    def leave(self) -> None:
        """Closes with FIN."""
        self.writer.close()

    def reset(self) -> None:
        """Closes with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def ask(port: int, path: str, body: object = None, **request: Any) -> Answer:
    """One request on a connection of its own."""
    async with await Caller.connect(port) as caller:
        caller.send(path, body, **request)
        return await caller.answer()


async def get(port: int, path: str, **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(port, path, method="GET", headers={"content-type": "", "content-length": "", **fields})
