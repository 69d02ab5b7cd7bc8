"""One request on its caller's connection.

What a small request costs is how much code and how many objects it touches. So a relayed one has neither
ASGI's scope, messages and events nor uvicorn's cycle, but a `Turn`: its state, and the relay's channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from vllm_gateway.web.channel import NO_CONTENT, Flow, Headers, Message
from vllm_gateway.web.routes import ROUTES, Route

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE = (b"connection", b"close")


class Target(NamedTuple):
    """What a request is for. `path` as metrics and the log have it."""

    path: str
    route: Route


TARGETS: Mapping[bytes, Target] = {path.encode(): Target(path, route) for path, route in ROUTES.items()}


class Connection(Protocol):
    """The connection of a turn's caller, as the turn needs it."""

    transport: asyncio.Transport
    read_paused: bool

    def resume_reading(self) -> None: ...
    def watch(self) -> None: ...
    async def drain(self) -> None: ...
    def unread(self) -> int: ...
    def answered(self) -> None:
        """The answer to the request at hand is complete."""
        ...


class Turn:
    """A request whose head has come, and the `Channel` of its answer. It has its turn once it is started.

    `body` is what has come of the body and was not received yet, `more_body` whether more is to come; `news`
    is set when either changes, once somebody waits for it. `owner` is the task that answers.
    """

    __slots__ = (
        "_chunks",
        "_connection",
        "_default_headers",
        "_head",
        "_transport",
        "_watching",
        "behind",
        "body",
        "finished",
        "flow",
        "forwards",
        "gone",
        "headers",
        "keep_alive",
        "more_body",
        "news",
        "owner",
        "started",
        "target",
        "waiting_for_100_continue",
    )

    def __init__(
        self,
        connection: Connection,
        target: Target,
        headers: Headers,
        default_headers: Headers,
        version: str,
        keep_alive: bool,
        expects: bool,
    ) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._default_headers = default_headers
        self._chunks = version == "1.1"
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expects
        self.body: bytes | bytearray = b""
        self.more_body = True
        self.news: asyncio.Event | None = None
        self.owner: asyncio.Task[None] | None = None
        self.flow: Flow | None = None
        self.gone = self.started = self.finished = False
        self.behind = False  # whether it is to wait until it is `ready`
        self.forwards = False  # whether the answer is chunked
        self._watching = False
        self._head = b""

    # The request

    def whole_body(self) -> bytes | None:
        """The usual request comes in one read, head and body, and need not wait for itself."""
        return None if self.more_body or self.gone else bytes(self.body)

    async def receive(self) -> Message:
        if self.waiting_for_100_continue and not self._transport.is_closing():
            self._transport.write(_CONTINUE)
        self.waiting_for_100_continue = False
        if self.news is None:
            self.news = asyncio.Event()
        while self.more_body and not (self.body or self.gone):
            self._connection.resume_reading()
            self.news.clear()
            await self.news.wait()
        if self.gone:
            return {"type": "http.disconnect"}
        body, self.body = self.body, b""
        return {"type": "http.request", "body": bytes(body), "more_body": self.more_body}

    def watch(self) -> None:
        """The connection calls `lost`; reading must go on, or it could not know."""
        self.body = b""  # it has been read, and the connection may idle for long
        self._watching = True
        if self._connection.read_paused:
            self._connection.watch()

    # The answer

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        self.started = True
        self.waiting_for_100_continue = False
        lines = [STATUS_LINE[status]]
        for name, value in (*self._default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        closing = _CLOSE in headers
        if closing:
            self.keep_alive = False
        if status == NO_CONTENT:
            pass
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif self._chunks:
            self.forwards = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self.keep_alive = False
        if not (self.keep_alive or closing):
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, block: bytes) -> None:
        self.forward(b"%x\r\n%b\r\n" % (len(block), block) if self.forwards else block)

    def forward(self, chunks: bytes) -> None:
        if self.gone:
            return
        if self._head:
            chunks, self._head = self._head + chunks, b""
        self._transport.write(chunks)

    def direct(self) -> Callable[[bytes], None] | None:
        # uvloop's raises where it was lost, so `flow` is told of that at once; the owner's turn comes later.
        return self._transport.write if self.forwards and not self._head else None

    def flush(self) -> None:
        if self._head:
            self.forward(b"")

    def finish(self, block: bytes = b"") -> None:
        if self.finished or self.gone:
            return
        self.finished = True
        if self.forwards:
            self.forward(b"%x\r\n%b\r\n0\r\n\r\n" % (len(block), block) if block else b"0\r\n\r\n")
        elif block or self._head:
            self.forward(block)
        if not self.keep_alive:
            self._transport.close()
        self._connection.answered()

    def abort(self) -> None:
        self.gone = True
        self._transport.abort()

    async def wait(self, done: asyncio.Future[Any]) -> None:
        await done

    async def ready(self) -> None:
        """Until the caller has read, nearly, what was answered before on its connection."""
        await self._connection.drain()

    def unread(self) -> int:
        return self._connection.unread()

    # What the connection tells

    def pause_writing(self) -> None:
        if self.flow is not None:
            self.flow.pause()

    def resume_writing(self) -> None:
        if self.flow is not None:
            self.flow.resume()

    def lost(self) -> None:
        """Nobody is there any more for what is not finished."""
        if self.finished:
            return
        self.gone, self.waiting_for_100_continue = True, False
        if self.news is not None:
            self.news.set()
        if self.flow is not None:
            self.flow.lost()
        if self._watching and self.owner is not None:
            self.owner.cancel()


class AsgiTurn(RequestResponseCycle):
    """uvicorn's cycle, in the words in which the connection knows a `Turn`."""

    @property
    def started(self) -> bool:
        return self.response_started

    @property
    def finished(self) -> bool:
        return self.response_complete

    @property
    def news(self) -> asyncio.Event:
        return self.message_event

    def pause_writing(self) -> None:
        """It looks by itself before it sends, and waits in `drain`."""

    def resume_writing(self) -> None:
        """As above."""

    def lost(self) -> None:
        if not self.response_complete:
            self.disconnected, self.waiting_for_100_continue = True, False
        self.message_event.set()
