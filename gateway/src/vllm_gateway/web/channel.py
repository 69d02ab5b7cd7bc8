"""The way back to the caller, twice: below ASGI onto the transport, and through plain ASGI `send`.

Both write a block in one piece, tell a `Flow` when to hold back, and cancel the request's own task (the
owner) when the caller leaves. The relay does not know which of the two it has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from vllm_gateway.web.protocol import EXTENSION, Raw

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HIGH_WATER = 64 * 1024
_NO_CONTENT = 204  # has no length either (RFC 9110, 8.6)


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

    def watch(self, receive: Receive) -> None:
        """From now on, once the body is read, the owner is cancelled when the caller leaves."""
        ...

    async def wait(self, done: asyncio.Future[Any]) -> None:
        """Until `done`, or until everything written is handed on, whichever is later."""
        ...

    async def ready(self) -> None:
        """Until the caller has read, nearly, what was answered before on its connection."""
        ...

    def unread(self) -> int:
        """Bytes that were written and that the caller has not read, as far as can be known here."""
        ...

    async def close(self) -> None:
        """Lets go of the connection; safe to call twice."""
        ...


class RawChannel:
    """Writes to uvicorn's transport. Every state of uvicorn's cycle that matters is kept as it keeps it."""

    def __init__(self, raw: Raw) -> None:
        self._protocol = raw.protocol
        self._cycle = raw.cycle
        self._transport: asyncio.Transport = raw.protocol.transport
        self._owner = asyncio.current_task()
        self._head = b""
        self.forwards = False  # whether the body is chunked
        self.flow: Flow | None = None
        self.gone = self._transport.is_closing() or self._cycle.disconnected
        self.started = False
        self.finished = False
        raw.protocol.listener = self

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        cycle = self._cycle
        # Before the first byte: were the task cancelled now, uvicorn would write a head of its own.
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        self.started = True
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % header for header in cycle.default_headers]
        lines += [b"%b: %b\r\n" % header for header in headers]
        cycle.keep_alive = cycle.keep_alive and (b"connection", b"close") not in headers
        if status == _NO_CONTENT:
            pass
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif cycle.scope["http_version"] == "1.1":
            self.forwards = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            cycle.keep_alive = False
        if not cycle.keep_alive and (b"connection", b"close") not in headers:
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
        if self._cycle.scope["method"] == "HEAD":
            block = b""  # the head says how long it would be (RFC 9110, 9.3.2)
        if self.forwards:
            self.forward(b"%x\r\n%b\r\n0\r\n\r\n" % (len(block), block) if block else b"0\r\n\r\n")
        elif block or self._head:
            self.forward(block)
        self._release()
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    def abort(self) -> None:
        self.gone = True
        self._cycle.disconnected = True
        self._transport.abort()

    def whole_body(self) -> bytes | None:
        """The usual request comes in one read, head and body, and need not wait for itself."""
        cycle = self._cycle
        return None if cycle.more_body or cycle.disconnected else bytes(cycle.body)

    def watch(self, receive: Receive) -> None:  # noqa: ARG002 - the other channel needs it
        """The protocol calls `connection_lost`; reading must go on, or it could not know."""
        self._cycle.body = bytearray()  # it has been read, and the connection may idle for long
        if not self._protocol.pipeline:
            self._protocol.flow.resume_reading()

    async def wait(self, done: asyncio.Future[Any]) -> None:
        if done.done():
            return
        # Awaited itself it would be cancelled with its waiter; asyncio.wait would do, for ten times as much.
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda _: None if waiter.done() else waiter.set_result(None))
        await waiter

    async def ready(self) -> None:
        if self._protocol.flow.write_paused:
            await self._protocol.flow.drain()

    def unread(self) -> int:
        return self._protocol.unread()

    async def close(self) -> None:
        self._release()

    # Listener

    def pause_writing(self) -> None:
        if self.flow is not None:
            self.flow.pause()

    def resume_writing(self) -> None:
        if self.flow is not None:
            self.flow.resume()

    def connection_lost(self) -> None:
        self.gone = True
        # uvicorn marks the connection's newest cycle only, which a pipelined request may have replaced.
        self._cycle.disconnected = True
        if self.flow is not None:
            self.flow.lost()
        if self._owner is not None and not self.finished:
            self._owner.cancel()

    def _release(self) -> None:
        if self._protocol.listener is self:
            self._protocol.listener = None


class AsgiChannel:
    """Plain ASGI: what is written waits here until the owner's task, in `wait`, has sent it."""

    def __init__(self, send: Send) -> None:
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
        extra = [] if length is None or status == _NO_CONTENT else [(b"content-length", b"%d" % length)]
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

    def watch(self, receive: Receive) -> None:
        self._watcher = asyncio.ensure_future(self._until_disconnect(receive))

    async def wait(self, done: asyncio.Future[Any]) -> None:
        done.add_done_callback(lambda _: self._news.set())
        while not (done.done() and not self._messages):
            await self._news.wait()
            self._news.clear()
            await self._flush()

    async def ready(self) -> None:
        """The server's `send` waits by itself."""

    def unread(self) -> int:
        return self._queued

    async def close(self) -> None:
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

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self.finished:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        if self._owner is not None:
            self._owner.cancel()


def channel_for(scope: Scope, send: Send) -> Channel:
    """The raw channel where the server offers its connection, plain ASGI where it does not."""
    raw = scope.get("extensions", {}).get(EXTENSION)
    return RawChannel(raw) if isinstance(raw, Raw) else AsgiChannel(send)
