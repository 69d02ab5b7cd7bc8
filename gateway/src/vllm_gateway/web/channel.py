"""The way to the caller and back. There are two: below ASGI (`turn`), and plain ASGI, as it is here.

Both write a block in one piece, tell a `Flow` when to hold back, and cancel the request's own task (the
owner) when the caller leaves. The relay does not know which of the two it has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HIGH_WATER = 64 * 1024
NO_CONTENT = 204  # has no length either (RFC 9110, 8.6)


class Flow(Protocol):
    """Who is told to stop and to go on writing, and when there is nobody any more to write to."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def lost(self) -> None: ...


class Channel(Protocol):
    """One answer. `gone` once the caller has left or was cut off; writing is then a no-op."""

    gone: bool
    started: bool
    finished: bool
    forwards: bool
    flow: Flow | None

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        """The head; without `length` the body is chunked, or ends with the connection for HTTP/1.0."""
        ...

    def write(self, block: bytes) -> None: ...
    def forward(self, chunks: bytes) -> None:
        """Whole chunks in HTTP's own framing, as an engine sent them; only where `forwards`."""
        ...

    def direct(self) -> Callable[[bytes], None] | None:
        """`forward` without its looks, once the head has gone out; None where there is no such way."""
        ...

    def finish(self, block: bytes = b"") -> None:
        """The body's last block and its end."""
        ...

    def flush(self) -> None:
        """Sends the head, if nothing was written after it: until then it waits, for one write less."""
        ...

    def abort(self) -> None:
        """Cuts the connection, so that the caller sees the answer as broken."""
        ...

    def whole_body(self) -> bytes | None:
        """The request's body if all of it is here; otherwise it is to be received."""
        ...

    def receive(self) -> Awaitable[Message]:
        """What comes of the body next, as ASGI says it."""
        ...

    def watch(self) -> None:
        """From now on, once the body is read, the owner is cancelled when the caller leaves."""
        ...

    async def wait(self, done: asyncio.Future[Any]) -> None:
        """Until `done`, or until everything written is handed on, whichever is later. `done` may be cancelled
        with the waiter, and never has an exception.
        """
        ...

    def unread(self) -> int:
        """Bytes that were written and that the caller has not read, as far as can be known here."""
        ...


class AsgiChannel:
    """Plain ASGI: what is written waits here until the owner's task, in `wait`, has sent it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._asgi_receive = receive
        self._asgi_send = send
        self._owner = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._messages: deque[Message] = deque()
        self._queued = 0
        self._news = asyncio.Event()
        self._paused = False
        self.forwards = False
        self.flow: Flow | None = None
        self.gone = False
        self.started = False
        self.finished = False

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        self.started = True
        extra = [] if length is None or status == NO_CONTENT else [(b"content-length", b"%d" % length)]
        self._put({"type": "http.response.start", "status": status, "headers": [*headers, *extra]}, 0)

    def write(self, block: bytes) -> None:
        self._put({"type": "http.response.body", "body": block, "more_body": True}, len(block))

    def forward(self, chunks: bytes) -> None:
        raise NotImplementedError("ASGI servers frame by themselves")

    def direct(self) -> None:
        """There is none."""

    def flush(self) -> None:
        """What was put is sent by the owner's task."""

    def finish(self, block: bytes = b"") -> None:
        if self.finished or self.gone:
            return
        self.finished = True
        self._put({"type": "http.response.body", "body": block, "more_body": False}, len(block))

    def abort(self) -> None:
        """ASGI has no way to cut: a server closes where an application returns in the middle."""
        self._leave()

    def whole_body(self) -> bytes | None:
        return None

    def receive(self) -> Awaitable[Message]:
        return self._asgi_receive()

    def watch(self) -> None:
        self._watcher = asyncio.ensure_future(self._until_disconnect())

    async def wait(self, done: asyncio.Future[Any]) -> None:
        done.add_done_callback(lambda _: self._news.set())
        while not (done.done() and not self._messages):
            await self._news.wait()
            self._news.clear()
            await self._flush()

    def unread(self) -> int:
        return self._queued

    async def close(self) -> None:
        """Sends what is left; safe to call twice."""
        if not self.gone:
            await self._flush()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None

    async def _flush(self) -> None:
        while self._messages and not self.gone:
            message = self._messages[0]
            try:
                await self._asgi_send(message)
            except OSError:  # ASGI 2.4: send after a disconnect
                self._leave()
                return
            self._messages.popleft()  # not before: a cancelled send has written nothing
            self._queued -= len(message.get("body", b""))
            if self._paused and self._queued <= _HIGH_WATER // 4:
                self._paused = False
                if self.flow is not None:
                    self.flow.resume()

    def _put(self, message: Message, size: int) -> None:
        if self.gone:
            return
        self._messages.append(message)
        self._queued += size
        self._news.set()
        if self._queued > _HIGH_WATER and not self._paused:
            self._paused = True
            if self.flow is not None:
                self.flow.pause()

    async def _until_disconnect(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.finished:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        if self._owner is not None:
            self._owner.cancel()
