"""The connections of callers: what uvicorn's HTTP protocol does, with limits on heads and a way around ASGI.

httptools limits nothing: a head of 20 MB was accepted. And on its way through uvicorn's protocol, its cycle
and ASGI a request touched so much code and so many objects that they were a sixth of what a small one costs.
So this is a protocol of its own: a POST that is relayed becomes a `Turn`, everything else goes by ASGI, with
uvicorn's own cycle. uvicorn is pinned, since this file does for that cycle, and for uvicorn's Server, what
`HttpToolsProtocol` does (0.54.0: protocols/http/httptools_impl.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.parse
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from vllm_gateway.deadlines import Deadlines
from vllm_gateway.errors import GatewayError, openai_body
from vllm_gateway.settings import RequestLimits
from vllm_gateway.web.channel import Headers
from vllm_gateway.web.stall import StallWatch, unread_bytes
from vllm_gateway.web.turn import TARGETS, AsgiTurn, Turn

_LOG = logging.getLogger("uvicorn.error")
_INVALID = "Invalid HTTP request received."
_LINGER_SECONDS = 1.0
_MOST_WAITING = 1000  # requests on one connection, behind the one that is answered
_UPGRADE = re.compile(rb"\r\nupgrade(\s*:)", re.IGNORECASE)


class Port:
    """What the connections of one listener have in common. `relay` answers a turn; times are in seconds."""

    __slots__ = (
        "app",
        "app_state",
        "connections",
        "heads",
        "idle",
        "limits",
        "loop",
        "relay",
        "state",
        "tasks",
        "write_stall",
    )

    def __init__(
        self,
        app: ASGI3Application,
        app_state: dict[str, Any],
        state: ServerState,
        relay: Callable[[Turn], Coroutine[Any, Any, None]],
        *,
        limits: RequestLimits,
        keep_alive: float,
        write_stall: float,
    ) -> None:
        self.app = app
        self.app_state = app_state
        self.state = state
        self.connections = cast("set[GatewayProtocol]", state.connections)
        self.tasks = state.tasks
        self.relay = relay
        self.limits = limits
        self.write_stall = write_stall
        self.loop = asyncio.get_running_loop()
        self.heads = Deadlines(self.loop, limits.header_timeout)
        self.idle = Deadlines(self.loop, keep_alive)


class GatewayProtocol(asyncio.Protocol):
    """One connection of a caller.

    `_newest` is the last request whose head has come; `_answering` is the one that is being answered, which
    with pipelining may be an earlier one. To uvicorn's cycle it is also its `FlowControl`.
    """

    __slots__ = (
        "_answering",
        "_expects",
        "_head_bytes",
        "_header_bytes",
        "_headers",
        "_in_body",
        "_in_head",
        "_newest",
        "_parser",
        "_pipeline",
        "_port",
        "_refusal",
        "_stall",
        "_url",
        "_waited_for",
        "_writable",
        "read_paused",
        "transport",
        "write_paused",
    )

    on_chunk_header = on_chunk_complete = None  # httptools looks for them, and finds faster than it misses

    def __init__(self, port: Port) -> None:
        self._port = port
        self._parser = httptools.HttpRequestParser(self)
        self._newest: Turn | AsgiTurn | None = None
        self._answering: Turn | AsgiTurn | None = None
        self._pipeline: deque[Turn | AsgiTurn] | None = None
        self._waited_for: Deadlines | None = None
        self._stall: StallWatch | None = None
        self._refusal: GatewayError | None = None
        self._writable: asyncio.Event | None = None
        self._in_head = self._in_body = self.read_paused = self.write_paused = False
        self._head_bytes = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        port = self._port
        port.connections.add(self)
        self._waited_for = port.heads
        port.heads.begin(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self._port.connections.discard(self)
        self._wait_no_more()
        self._stop_stall_watch()
        if self._writable is not None:
            self._writable.set()
        newest, answering = self._newest, self._answering
        # They, and what answers, know this connection: so it is no garbage that must be looked for.
        self._parser = self._newest = self._answering = self._pipeline = None
        if newest is not None:
            newest.lost()
        if answering is not None and answering is not newest:
            answering.lost()

    def eof_received(self) -> None:
        """The transport closes."""

    def shutdown(self) -> None:
        """For uvicorn's Server, as it stops: what is idle is closed now, what is busy after its answer."""
        if self._newest is None or self._newest.finished:
            self.transport.close()
        else:
            self._newest.keep_alive = False

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._writable is not None:
            self._writable.clear()
        self._stop_stall_watch()
        # Whatever was written last, and though nobody waits for it: a caller that reads nothing must not
        # hold it for ever. A stream gives up a little earlier, and says why in its metrics.
        port = self._port
        self._stall = StallWatch(port.loop, port.write_stall + 1.0, self.unread, self.transport.abort)
        if self._answering is not None:
            self._answering.pause_writing()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
        self._stop_stall_watch()
        if self._answering is not None:
            self._answering.resume_writing()

    async def drain(self) -> None:
        """Until the transport holds little again."""
        if self.write_paused and not self.transport.is_closing():
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()

    def pause_reading(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def watch(self) -> None:
        """Reads on, so that the caller's leaving is noticed, but not past a request that waits."""
        if not self._pipeline:
            self.resume_reading()

    def unread(self) -> int:
        """Bytes that were written and that the caller has not read."""
        return unread_bytes(self.transport)

    def _stop_stall_watch(self) -> None:
        if self._stall is not None:
            self._stall.stop()
            self._stall = None

    # How long the caller is waited for

    def _wait_for(self, deadline: Deadlines) -> None:
        self._wait_no_more()
        self._waited_for = deadline
        deadline.begin(self)

    def _wait_no_more(self) -> None:
        if self._waited_for is not None:
            self._waited_for.end(self)
            self._waited_for = None

    def too_late(self) -> None:
        """Called by the deadline."""
        self._waited_for = None
        if self.transport.is_closing():
            return
        if self._in_head:
            text = f"The request's head did not arrive within {self._port.limits.header_timeout:g} s."
            self.refuse(GatewayError(408, "head_too_slow", text))
        else:
            self.transport.close()

    # The request

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self.transport.is_closing():
            return
        port, inside = self._port, self._in_head or self._in_body
        if data.find(b"pgrade") >= 0 and not self._in_body:
            data = _without_upgrade(data)
        if inside:  # the parser holds what it has not reported: of a head, or of trailers
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse_what_came()
            return
        if self._head_bytes > port.limits.header_bytes + port.limits.url_bytes:
            self.refuse(_head_too_large(port.limits))
        elif self._waited_for is port.idle:  # an empty line, or the rest of a body after its answer
            self._wait_for(port.idle)

    def on_message_begin(self) -> None:
        self._url, self._expects = b"", False
        self._headers: Headers = []
        self._in_head = True
        self._head_bytes = self._header_bytes = 0
        heads = self._port.heads
        if self._waited_for is not heads:
            self._wait_for(heads)

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._port.limits.url_bytes:
            self._refusal = GatewayError(414, "url_too_long", "The URL is too long.")
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer must not pass as a header (RFC 9110, 6.5.1)
            return
        name = name.lower()
        self._headers.append((name, value))
        self._header_bytes += len(name) + len(value)
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._wait_no_more()
        limits = self._port.limits
        if self._header_bytes > limits.header_bytes or len(self._headers) > limits.header_count:
            self._refusal = _head_too_large(limits)
            raise _Refused
        if self._parser.should_upgrade():
            self._refusal = GatewayError(400, "upgrade_not_supported", "Connections are not upgraded here.")
            raise _Refused
        before, self._newest = self._newest, self._turn()
        if before is None or before.finished:
            self._start(self._newest)
        else:
            self.pause_reading()
            if self._pipeline is None:
                self._pipeline = deque()
            self._pipeline.append(self._newest)
            if len(self._pipeline) > _MOST_WAITING:
                text = f"More than {_MOST_WAITING} requests wait for their answers on this connection."
                self._refusal = GatewayError(429, "too_many_pipelined", text)
                raise _Refused

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        turn = self._newest
        if turn is None or turn.finished:
            return
        if not turn.body and isinstance(turn, Turn):
            turn.body = body  # the usual one, whole
        else:
            if isinstance(turn.body, bytes):
                turn.body = bytearray(turn.body)
            turn.body += body
        if len(turn.body) > HIGH_WATER_LIMIT:
            self.pause_reading()
        if turn.news is not None:
            turn.news.set()

    def on_message_complete(self) -> None:
        self._in_body = False
        turn = self._newest
        if turn is None or turn.finished:
            return
        turn.more_body = False
        if turn.news is not None:
            turn.news.set()

    def _turn(self) -> Turn | AsgiTurn:
        """Of the request whose head has come."""
        parser, port = self._parser, self._port
        version: str = parser.get_http_version()
        keep_alive: bool = version != "1.0" and parser.should_keep_alive()
        if not keep_alive:  # what comes after its last request must not break the answer
            parser.set_dangerous_leniencies(lenient_data_after_close=True)
        if parser.get_method() == b"POST":
            path = self._url.partition(b"?")[0]
            if not path.startswith(b"/"):  # an absolute target
                path = httptools.parse_url(self._url).path
            target = TARGETS.get(path)
            if target is not None:
                dated = port.state.default_headers
                return Turn(self, target, self._headers, dated, version, keep_alive, self._expects)
        return AsgiTurn(
            self._scope_of(version),
            self.transport,
            cast("FlowControl", self),
            _LOG,
            _LOG,
            False,
            port.state.default_headers,
            asyncio.Event(),
            self._expects,
            keep_alive,
            self.answered,
        )

    def _scope_of(self, version: str) -> HTTPScope:
        """As ASGI has it (https://asgi.readthedocs.io/en/latest/specs/www.html#http-connection-scope)."""
        parsed = httptools.parse_url(self._url)
        path = parsed.path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": None,  # nothing wants to know, and the kernel would have to be asked
            "client": None,
            "scheme": "https" if self.transport.get_extra_info("sslcontext") is not None else "http",
            "method": self._parser.get_method().decode("ascii"),
            "root_path": "",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": parsed.path,
            "query_string": parsed.query or b"",
            "headers": self._headers,
            "state": self._port.app_state.copy(),
        }

    # The answer

    def _start(self, turn: Turn | AsgiTurn) -> None:
        self._answering = turn
        port = self._port
        if isinstance(turn, Turn):
            turn.behind = self.write_paused
            turn.owner = task = port.loop.create_task(port.relay(turn), name=turn.target.path)
        else:
            task = port.loop.create_task(turn.run_asgi(port.app))
        port.tasks.add(task)
        task.add_done_callback(port.tasks.discard)

    def answered(self) -> None:
        """The request at hand is: the next one is taken up, or waited for."""
        answered, self._answering = self._answering, None
        if isinstance(answered, AsgiTurn):
            answered.body = bytearray()  # what nobody read of it, while the connection may idle for long
        if self.transport.is_closing():
            return
        following = self._pipeline.popleft() if self._pipeline else None
        if self.read_paused and not self._pipeline:  # else a caller's requests would pile up here
            self.resume_reading()
        if following is not None:
            self._start(following)
        elif self._waited_for is None:  # else the next one's head has begun
            self._wait_for(self._port.idle)

    def _refuse_what_came(self) -> None:
        _LOG.warning(_INVALID)
        self.refuse(self._refusal or GatewayError(400, "invalid_http", _INVALID))

    def refuse(self, error: GatewayError) -> None:
        """Answers a request that never became one, and closes.

        While another answer is under way on the connection nothing may be written into it: then the
        connection just ends. Otherwise what still comes is read for a moment, since closing over unread
        data would reset the connection and take the answer with it.
        """
        self._refusal = error
        self._wait_no_more()
        newest = self._newest
        if newest is not None and not newest.finished:
            if newest.started or self._pipeline:
                self.transport.close()
                return
            newest.lost()  # whoever answers it must not write after the refusal, which is its answer now
        self.transport.write(_response(error))
        if self.transport.can_write_eof():  # not over TLS, whose own end comes with close()
            self.transport.write_eof()
        self._port.loop.call_later(_LINGER_SECONDS, self.transport.close)


class _Refused(Exception):
    """Stops the parser; the answer is in `_refusal`."""


def _without_upgrade(data: bytes) -> bytes:
    """Renames an offer to upgrade, since httptools loses the body of a request that has one.

    A server may ignore an offer (RFC 9110, 7.8), and Java's HTTP client offers h2c with each request. An
    offer that is cut by the end of a read is refused instead.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return b"".join((_UPGRADE.sub(rb"\r\nx-grade\1", head), end, rest))


def _head_too_large(limits: RequestLimits) -> GatewayError:
    text = f"The headers are larger than {limits.header_bytes} bytes or more than {limits.header_count}."
    return GatewayError(431, "headers_too_large", text)


def _response(error: GatewayError) -> bytes:
    body = json.dumps(openai_body(error)).encode()
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[error.status] + head + body
