"""One request and its answer: what is known of it, and the few ways to answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy import multipart
from vllm_gateway.policy.keys import ANONYMOUS
from vllm_gateway.policy.limits import JSON, body_too_large, body_too_slow, check_declared
from vllm_gateway.policy.rates import Permit
from vllm_gateway.policy.room import Held, Room
from vllm_gateway.settings import RequestLimits
from vllm_gateway.telemetry import UNKNOWN_MODEL
from vllm_gateway.tracing import Trace
from vllm_gateway.web.channel import Channel, Headers

_DISCARD_SECONDS = 1.0
CLIENT_CLOSED = 499  # nginx's code for a caller that left; it stands in metrics and logs only


class Disconnected(Exception):
    """The caller left before the request was read."""


class Exchange:
    """A request with its channel. `status`, `model` and `outcome` are what the metrics and the log say.

    `caller` and `permit` are those of `Visit`, `body_held` is what its body, then its answer, takes of the
    gateway's room; `error_event` is how to end a stream that was begun before an engine answered.
    `stream_outcome` is empty but for an engine's stream; times are the loop's.
    """

    __slots__ = (
        "_error_body",
        "_unread",
        "body_held",
        "caller",
        "channel",
        "common",
        "completion_tokens",
        "ended_at",
        "error_event",
        "first_token_at",
        "headers",
        "method",
        "model",
        "outcome",
        "permit",
        "prompt_tokens",
        "request_id",
        "route",
        "started_at",
        "status",
        "stream_outcome",
        "trace",
    )

    def __init__(
        self,
        method: str,
        route: str,
        headers: Mapping[bytes, bytes],
        request_id: str,
        common: Headers,
        channel: Channel,
        room: Room,
        error_body: Callable[[GatewayError], dict[str, Any]],
    ) -> None:
        self.method = method
        self.route = route
        self.headers = headers
        self.request_id = request_id
        self.channel = channel
        self.model = UNKNOWN_MODEL
        self.caller = ANONYMOUS
        self.permit: Permit | None = None
        self.body_held = Held(room)
        self.status = 0
        self.outcome = ""
        self.error_event: Callable[[GatewayError], bytes] | None = None
        self.trace: Trace | None = None
        self.started_at = asyncio.get_running_loop().time()
        self.first_token_at: float | None = None
        self.ended_at = self.started_at
        self.prompt_tokens = self.completion_tokens = 0
        self.stream_outcome = ""
        self.common = common
        self._error_body = error_body
        self._unread = True

    def let_go(self) -> None:
        """Gives back what it holds of the key's limits; safe to call twice."""
        if self.permit is not None:
            self.permit.give_back()
            self.permit = None

    def body(self, limits: RequestLimits) -> Coroutine[Any, Any, bytes]:
        """The request's body, which is JSON. Raises GatewayError (408, 413, 415) or Disconnected."""
        return self._body(limits, limits.body_bytes, JSON)

    def form(self, limits: RequestLimits) -> Coroutine[Any, Any, bytes]:
        """The same of a form with a file."""
        return self._body(limits, limits.upload_bytes, multipart.KIND)

    async def _body(self, limits: RequestLimits, max_bytes: int, kind: bytes) -> bytes:
        check_declared(self.headers, max_bytes, kind)
        whole = self.channel.whole_body()
        if whole is not None and len(whole) <= max_bytes:
            self._unread = False
            self.body_held.add(len(whole))
            self.channel.watch()
            return whole
        try:
            async with asyncio.timeout(limits.body_timeout):
                body = await self._read(max_bytes)
        except TimeoutError:
            raise body_too_slow(limits.body_timeout) from None
        self.channel.watch()
        return body

    async def _read(self, limit: int) -> bytes:
        pieces: list[bytes] = []
        left = limit
        while self._unread:
            message = await self.channel.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            piece: bytes = message.get("body", b"")
            pieces.append(piece)
            left -= len(piece)
            self._unread = bool(message.get("more_body", False))
            if left < 0:
                raise body_too_large(limit)
            self.body_held.add(len(piece))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def start(self, status: int, headers: Headers, length: int | None = None) -> None:
        self.status = status
        self.channel.start(status, [*headers, *self.common], length)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.start(status, headers, len(body))
        self.channel.finish(body)

    def respond_json(self, status: int, document: object, headers: Headers | None = None) -> None:
        content = (b"content-type", b"application/json")
        self.respond(status, [content, *(headers or [])], json.dumps(document).encode())

    async def respond_error(self, error: GatewayError) -> None:
        """An error in the family's shape. What is left of the body is read first, for a moment: closing over
        unread data would reset the connection and the caller would never see the answer.
        """
        headers: Headers = [] if error.allow is None else [(b"allow", error.allow.encode())]
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after))
        if self._unread and error.status != 408:  # that one has had its time
            await self._discard()
        if self._unread:
            headers.append((b"connection", b"close"))
        self.outcome = error.code
        self.respond_json(error.status, self._error_body(error), headers)

    async def _discard(self) -> None:
        if b"expect" in self.headers:
            return  # the caller waits for leave to send, and gets none
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while self._unread:
                    message = await self.channel.receive()
                    if message["type"] == "http.disconnect":
                        return
                    self._unread = bool(message.get("more_body", False))
