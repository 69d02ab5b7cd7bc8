"""A pooled HTTP/1.1 client on `asyncio.Protocol`: what a stream costs is what this file costs.

One `Connection` carries one request at a time. The head is awaited; the body is pushed to a `Sink` as it is
read, with `pause()` and `resume()` for back-pressure.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol

from vllm_gateway.deadlines import Deadlines, Limits
from vllm_gateway.errors import UpstreamFailure
from vllm_gateway.routing.table import Endpoint
from vllm_gateway.sockets import acknowledge_less, give_up_unheard
from vllm_gateway.upstream.http1 import MAX_HEAD_BYTES, Body, ChunkedBody, EofBody, Head, Heads

_MAX_EARLY = 256 * 1024
_NOT_CHUNKED = ChunkedBody()  # in place of none, which would have to be asked for with each read


class Sink(Protocol):
    """Where a body goes, one call a read. After `end` or `failed` nothing more is called."""

    def data(self, payload: bytes) -> None: ...
    def end(self, payload: bytes) -> None:
        """The body's last piece, which may be empty."""
        ...

    def failed(self, failure: UpstreamFailure) -> None: ...


class Tap(Protocol):
    """Who may take whole chunks of a body before they are decoded."""

    def take(self, data: bytes) -> int:
        """How many bytes of a read, which begins with a chunk's first byte, it has taken: whole chunks, and
        never the last one, of size 0.
        """
        ...


class Connection(asyncio.Protocol):
    """One TCP connection to an engine. `sock` is its socket, if it is known: to ask uvloop's transport for it
    takes a new object and a system call each time.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, heads: Heads, sock: socket.socket | None = None
    ) -> None:
        self._loop = loop
        self._heads = heads
        self._sock = sock
        self._transport: asyncio.Transport | None = None
        self._awaited: asyncio.Future[Head] | None = None
        self._arrived: Callable[[Head], None] | None = None
        self._buffer = b""
        self._body: Body | None = None
        self._sink: Sink | None = None
        self._tap: Tap | None = None
        self._chunks = _NOT_CHUNKED
        self._failure: UpstreamFailure | None = None
        self._keep_alive = False
        self._paused = False
        self._diverted = False
        self.reused = False
        self.idle_since = 0.0
        self.waits_among: deque[Connection] | None = None  # while no request is on it

    # What the caller of an engine uses.

    async def exchange(
        self, request: bytes, limit: Deadlines | None = None, arrived: Callable[[Head], None] | None = None
    ) -> Head:
        """Sends a request and returns the head of the answer. Raises UpstreamFailure, or TimeoutError where
        that takes longer than `limit` allows.

        `arrived` is called with it first, as it is read, and may `start` the body: the task that waits here
        has its turn when all has been read that other connections have, which under load is a millisecond.

        A failure is retryable if the connection was a reused one and not one byte of an answer came: the
        engine closed it just as the request was sent. A new connection that closes may mean that the request
        itself killed the engine, and must not kill the next one too.
        """
        if self._transport is None or self._failure is not None:
            raise self._failure or self._lost(None)
        self._awaited, self._arrived = self._loop.create_future(), arrived
        if limit is not None:
            limit.begin(self)
        try:
            self._transport.write(request)
            return await self._awaited
        finally:
            self._awaited = self._arrived = None
            if limit is not None:
                limit.end(self)

    def start(self, sink: Sink, tap: Tap | None = None) -> None:
        """Delivers the body to `sink`, beginning with what has come already; `tap` is asked first."""
        self._sink = sink
        if tap is not None and self._sock is not None and self._sock.fileno() >= 0:
            acknowledge_less(self._sock)
        if isinstance(self._body, ChunkedBody):
            self._chunks, self._tap = self._body, tap
        early, self._buffer = self._buffer, b""
        self.resume()
        if early:
            self._deliver(early)
        elif self._body is not None and self._body.done:
            self._finish(b"")
        if self._failure is not None and self._sink is not None:
            self._fail(self._failure)

    def divert(self, protocol: asyncio.Protocol) -> None:
        """Until the body's end reads go to `protocol`, which calls `data_received` for what it does not take,
        and `connection_lost`.
        """
        if self._transport is not None:
            self._diverted = True
            self._transport.set_protocol(protocol)

    def pause(self) -> None:
        """Stops reading until `resume`, so that the engine's kernel, then the engine, has to wait."""
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def close(self) -> None:
        """Closes at once, which is what tells an engine to stop generating (vLLM: within 0.2 s)."""
        self._sink = self._tap = None
        self._wait_no_more()
        self._failure = self._failure or UpstreamFailure("closed", "closed here")
        if self._transport is not None:
            self._transport.abort()

    @property
    def reusable(self) -> bool:
        """Whether the last answer was read to its end and the engine keeps the connection open."""
        return self._keep_alive and self._failure is None and self._body is None and not self._buffer

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        tap = self._tap
        if tap is not None and self._chunks.between:
            taken = tap.take(data)
            if taken == len(data):
                return
            data = data[taken:] if taken else data
        if self._sink is not None:
            self._deliver(data)
        elif self._awaited is not None and not self._awaited.done():
            self._read_head(data)
        elif self._body is not None:
            self._hold_early(data)
        else:  # bytes that nobody asked for: never let them become the next answer
            self._fail(UpstreamFailure("bad_response", "data outside a response"))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and isinstance(self._body, EofBody):
            self._body.done = True
            if self._sink is not None:
                self._finish(b"")
        self._fail(self._lost(exc))
        self._wait_no_more()

    # Reading

    def _deliver(self, data: bytes) -> None:
        sink, body = self._sink, self._body
        if sink is None or body is None:
            return
        try:
            payload = body.feed(data)
        except UpstreamFailure as failure:
            self._fail(failure)
            return
        if body.done:
            self._finish(payload)
        elif payload:
            sink.data(payload)

    def _read_head(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if (end if end >= 0 else len(self._buffer)) > MAX_HEAD_BYTES:
            self._fail(UpstreamFailure("bad_response", "the head of the response is too long"))
        if end < 0 or self._failure is not None:
            return
        raw, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
        try:
            head = self._heads.parse(raw)
        except UpstreamFailure as failure:
            self._fail(failure)
            return
        if head.status < 200:  # 100 Continue, 103 Early Hints: the answer follows
            self._read_head(b"")
            return
        self._keep_alive = head.keep_alive
        self._body = head.framing()
        if self._awaited is not None:
            self._awaited.set_result(head)
        if self._arrived is not None:
            self._arrived(head)

    def _hold_early(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > _MAX_EARLY:
            self.pause()

    # Ends

    def too_late(self) -> None:
        """Called by the limit of an exchange."""
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(TimeoutError())

    def _finish(self, payload: bytes) -> None:
        body, sink = self._body, self._sink
        self._body = self._sink = self._tap = None
        if self._diverted and self._transport is not None:
            self._diverted = False
            self._transport.set_protocol(self)
        if body is not None and body.surplus:
            self._keep_alive = False
        if sink is not None:
            sink.end(payload)

    def _fail(self, failure: UpstreamFailure) -> None:
        self._failure = self._failure or failure
        sink = self._sink
        self._sink = self._tap = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(failure)
        if sink is not None:
            sink.failed(failure)

    def _wait_no_more(self) -> None:
        """Nobody may be given it any more."""
        if self.waits_among is not None:
            self.waits_among.remove(self)
            self.waits_among = None

    def _lost(self, exc: Exception | None) -> UpstreamFailure:
        if self._body is None and not self._buffer:
            detail = f"closed without an answer ({exc or 'end of stream'})"
            return UpstreamFailure("closed_early", detail, retryable=self.reused)
        return UpstreamFailure("eof" if exc is None else "reset", f"broke off ({exc or 'end of stream'})")


class Client:
    """Connections to engines, kept for reuse for `keep_alive` seconds; last in, first out.

    A host that acknowledges nothing of a request for `unheard` seconds is gone. That of an engine which hangs
    still does; so this is far less than an engine may take for a first token. `limits` are those of all that
    an engine's answer is waited for.
    """

    def __init__(self, *, connect_timeout: float, keep_alive: float, unheard: float = 30.0) -> None:
        self._connect_timeout = connect_timeout
        self._unheard = unheard
        self._keep_alive = keep_alive
        self._heads = Heads()
        self.limits = Limits()
        self._idle: dict[Endpoint, deque[Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    def idle(self, endpoint: Endpoint) -> Connection | None:
        """A connection that has had a request before and has none now."""
        while idle := self._idle.get(endpoint):
            connection = idle.pop()
            connection.waits_among = None
            if connection.reusable:
                connection.reused = True
                return connection
            connection.close()
        return None

    async def dial(self, endpoint: Endpoint) -> Connection:
        """A new connection. Raises UpstreamFailure."""
        loop = asyncio.get_running_loop()
        where = f"{endpoint.host}:{endpoint.port}"
        try:
            async with asyncio.timeout(self._connect_timeout):
                sock = await _connected(endpoint, loop)
                give_up_unheard(sock, self._unheard)
                connection = Connection(loop, self._heads, sock)
                name = endpoint.host if endpoint.tls else None
                await loop.create_connection(
                    lambda: connection, sock=sock, ssl=self._context(endpoint), server_hostname=name
                )
        except TimeoutError as error:
            raise UpstreamFailure("connect_timeout", where, retryable=True) from error
        except (OSError, ssl.SSLError) as error:
            raise UpstreamFailure("connect", f"{where}: {error}", retryable=True) from error
        return connection

    def distrust(self, endpoint: Endpoint, lost: Connection) -> None:
        """A reused connection was closed under its request: those that have been idle for as long as it had
        are not used either. If their engine has gone without a word, each would cost a request as long.
        """
        for connection in list(self._idle.get(endpoint, ())):
            if connection.idle_since <= lost.idle_since:
                connection.close()

    def release(self, endpoint: Endpoint, connection: Connection) -> None:
        """Takes a connection back: kept if its answer was read to the end, closed otherwise."""
        if not connection.reusable:
            connection.close()
            return
        connection.resume()  # its last read may have been too much for a slow caller
        loop = asyncio.get_running_loop()
        idle = self._idle.get(endpoint)
        if idle is None:
            idle = self._idle[endpoint] = deque()
        idle.append(connection)
        connection.idle_since, connection.waits_among = loop.time(), idle
        if self._sweep is None:
            self._sweep = loop.call_later(self._keep_alive, self._close_old)

    def close(self) -> None:
        """Closes every idle connection."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for idle in self._idle.values():
            for connection in list(idle):
                connection.close()
        self._idle.clear()

    @property
    def idle_count(self) -> int:
        return sum(map(len, self._idle.values()))

    def _context(self, endpoint: Endpoint) -> ssl.SSLContext | None:
        if not endpoint.tls:
            return None
        self._tls = self._tls or ssl.create_default_context()
        return self._tls

    def _close_old(self) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() - self._keep_alive
        for endpoint, idle in list(self._idle.items()):
            for connection in [connection for connection in idle if connection.idle_since <= limit]:
                connection.close()
            if not idle:
                del self._idle[endpoint]
        again = bool(self._idle)
        self._sweep = loop.call_later(self._keep_alive / 2, self._close_old) if again else None


async def _connected(endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> socket.socket:
    """A connection to the first of the host's addresses that takes one. Raises OSError."""
    refusal: OSError | None = None
    found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # IPv6, say, which this kernel lacks
            refusal = refusal or error
            continue
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            refusal = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise refusal or OSError("no address")
