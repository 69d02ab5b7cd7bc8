"""uvicorn's HTTP protocol, with limits on heads, and with the connection offered to the relay.

httptools limits nothing: a head of 20 MB was accepted. And ASGI's `send` costs more than a stream's relaying
does; so the request's scope carries an extension through which a `RawChannel` writes to the transport.
uvicorn is pinned, since this file depends on its insides (0.54.0: protocols/http/httptools_impl.py).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import urllib.parse
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, cast

import httptools
from uvicorn._types import HTTPScope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from vllm_gateway.errors import GatewayError, openai_body
from vllm_gateway.settings import RequestLimits
from vllm_gateway.web.stall import StallWatch, unread_bytes

_LOG = logging.getLogger("uvicorn.error")
_LINGER_SECONDS = 1.0
_UPGRADE = re.compile(rb"\r\nupgrade(\s*:)", re.IGNORECASE)
EXTENSION = "vllm_gateway.connection"


class Listener(Protocol):
    """Who answers the request at hand and must know how the caller's connection is."""

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self) -> None: ...


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class Raw:
    """What the scope's extension holds: this request's connection and its own cycle.

    The cycle is bound when the head is complete: a pipelined request replaces `protocol.cycle` while the
    one before it is still being answered.
    """

    protocol: GatewayProtocol
    cycle: RequestResponseCycle


class GatewayProtocol(HttpToolsProtocol):
    """One connection of a caller."""

    def __init__(  # not uvicorn's: it looks up loggers, with a lock, for each connection
        self,
        limits: RequestLimits,
        write_stall: float,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.config, self.app, self.app_state = config, config.loaded_app, app_state
        self.loop = _loop or asyncio.get_running_loop()
        self.logger, self.access_logger, self.access_log = _LOG, _LOG, False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.ws_protocol_class = None
        self.timeout_keep_alive_task = None
        self.timeout_keep_alive = config.timeout_keep_alive
        self.server_state = server_state
        self.connections, self.tasks = server_state.connections, server_state.tasks
        self.client = None  # nothing wants to know
        self.pipeline = deque()
        self.expect_100_continue = False
        self.cycle = None  # type: ignore[assignment]
        self._limits = limits
        self._write_stall = write_stall
        self._in_head = False
        self._head_bytes = self._header_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall: StallWatch | None = None
        self._refusal: GatewayError | None = None
        self.listener: Listener | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # Not uvicorn's: it asks the kernel for both ends' addresses, which nothing here wants to know.
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        self.scheme = "https" if transport.get_extra_info("sslcontext") is not None else "http"
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._stop_stall_watch()
        super().connection_lost(exc)
        if self.listener is not None:  # nobody waits in receive(): the owner of the answer must be woken
            self.listener.connection_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stall_watch()
        # Whatever was written last, and though nobody waits for it: a caller that reads nothing must not
        # hold it for ever. A stream gives up a little earlier, and says why in its metrics.
        self._stall = StallWatch(self.loop, self._write_stall + 1.0, self.unread, self.transport.abort)
        if self.listener is not None:
            self.listener.pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_watch()
        if self.listener is not None:
            self.listener.resume_writing()

    # The head

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        cycle: RequestResponseCycle | None = self.cycle
        in_body = cycle is not None and cycle.more_body
        if b"pgrade" in data and (self._in_head or not in_body):
            data = _without_upgrade(data)
        if self._in_head or in_body:  # the parser holds what it has not reported: of a head, or of trailers
            self._head_bytes += len(data)
        super().data_received(data)
        too_large = self._head_bytes > self._limits.header_bytes + self._limits.url_bytes
        if too_large and self._refusal is None:
            self.refuse(_head_too_large(self._limits))
        elif not self._in_head:
            self._keep_idle_timer()

    def _keep_idle_timer(self) -> None:
        """Sets it again where what came was no request: uvicorn ends it with any read, even an empty line."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle.response_complete and self.timeout_keep_alive_task is None:
            handler = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handler)

    # Not uvicorn's, which builds a scope in four of these: each function less makes a request cheaper, since
    # the processor has others' code in its caches by then.

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._in_head = True
        self._head_bytes = self._header_bytes = 0
        if self._head_timer is None:
            self._arm_head_timer()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > self._limits.url_bytes:
            self._refusal = GatewayError(414, "url_too_long", "The URL is too long.")
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer must not pass as a header (RFC 9110, 6.5.1)
            return
        name = name.lower()
        self.headers.append((name, value))
        self._header_bytes += len(name) + len(value)
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._cancel_head_timer()
        if self._header_bytes > self._limits.header_bytes or len(self.headers) > self._limits.header_count:
            self._refusal = _head_too_large(self._limits)
            raise _Refused
        if self.parser.should_upgrade():
            self._refusal = GatewayError(400, "upgrade_not_supported", "Connections are not upgraded here.")
            raise _Refused
        self._begin(self.parser.get_http_version())

    def _begin(self, version: str) -> None:
        """Starts the request, or has it wait until the one before it on the connection is answered."""
        before: RequestResponseCycle | None = self.cycle
        self.scope = self._scope_of(version)
        self.cycle = RequestResponseCycle(
            self.scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.scope["extensions"] = {EXTENSION: cast("dict[object, object]", Raw(self, self.cycle))}
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _scope_of(self, version: str) -> HTTPScope:
        """As ASGI has it (https://asgi.readthedocs.io/en/latest/specs/www.html#http-connection-scope)."""
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": None,
            "client": None,
            "scheme": self.scheme or "http",
            "method": self.parser.get_method().decode("ascii"),
            "root_path": "",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": parsed.path,
            "query_string": parsed.query or b"",
            "headers": self.headers,
            "state": self.app_state.copy(),
        }

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn wherever the parser, or a callback of it, raises."""
        self.refuse(self._refusal or GatewayError(400, "invalid_http", msg))

    def refuse(self, error: GatewayError) -> None:
        """Answers a request that never became one, and closes.

        While another answer is under way on the connection nothing may be written into it: then the
        connection just ends. Otherwise what still comes is read for a moment, since closing over unread
        data would reset the connection and take the answer with it.
        """
        self._refusal = error
        self._cancel_head_timer()
        if not self._may_answer():
            self.transport.close()
            return
        self._end_request()
        self.transport.write(_response(error))
        if self.transport.can_write_eof():  # not over TLS, whose own end comes with close()
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _end_request(self) -> None:
        """Whoever answers the request at hand must not write after the refusal, which is its answer now."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected, cycle.waiting_for_100_continue = True, False
            cycle.message_event.set()
        if self.listener is not None:
            self.listener.connection_lost()

    def _may_answer(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline)

    def _arm_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_timeout, self._head_too_slow)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def unread(self) -> int:
        """Bytes that were written and that the caller has not read."""
        return unread_bytes(self.transport)

    def _stop_stall_watch(self) -> None:
        if self._stall is not None:
            self._stall.stop()
            self._stall = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self._in_head:
            text = f"The request's head did not arrive within {self._limits.header_timeout:g} s."
            self.refuse(GatewayError(408, "head_too_slow", text))
        elif not self.transport.is_closing():
            self.transport.close()


class _Refused(Exception):
    """Stops the parser; the answer is in `_refusal`."""


def protocol_factory(limits: RequestLimits, write_stall: float) -> type[asyncio.Protocol]:
    """What uvicorn's `http` setting takes: it calls it with keywords for each connection."""
    return cast("type[asyncio.Protocol]", functools.partial(GatewayProtocol, limits, write_stall))


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
