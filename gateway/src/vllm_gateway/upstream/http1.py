"""The response side of HTTP/1.1, as far as an engine needs it (RFC 9112).

httptools reads heads. Bodies are decoded here: a callback of httptools for each chunk costs more than the
whole of what a relay does with it, and vLLM's usual read is exactly one chunk.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httptools

from vllm_gateway.errors import UpstreamFailure

MAX_HEAD_BYTES = 64 * 1024
_KEPT_HEAD_BYTES = 1024
_KEPT_HEADS = 64
_MAX_CHUNK_LINE = 256
_MAX_TRAILER_BYTES = 8 * 1024
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})(?:;[^\r\n]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n)*\r\n")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_LAST_CHUNK = b"0\r\n\r\n"
# Size line of a chunk -> its size. What is not here (capitals, extensions, over 4 kB) takes a longer way.
SIZES = {b"%x\r\n" % size: size for size in range(1, 4096)}


class Body(Protocol):
    """Decodes a body's framing. `done` once it is complete; `surplus` if bytes followed it."""

    done: bool
    surplus: bool

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises UpstreamFailure("bad_response") where the framing is broken."""
        ...


class NoBody:
    """204, 304: nothing follows the head."""

    done = True
    surplus = False

    def feed(self, data: bytes) -> bytes:
        self.surplus = self.surplus or bool(data)
        return b""


class LengthBody:
    """A body of `content-length` bytes."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.surplus = False

    def feed(self, data: bytes) -> bytes:
        payload = data[: self._left]
        self._left -= len(payload)
        self.done = self._left == 0
        self.surplus = len(payload) < len(data)
        return payload


class EofBody:
    """A body that the end of the connection ends; whoever sees that end sets `done`."""

    def __init__(self) -> None:
        self.done = False
        self.surplus = False

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedBody:
    """`transfer-encoding: chunked`. Sizes are 1 to 8 hex digits; extensions and trailers are dropped.

    `between` is true where the next byte is a chunk's first: whoever knows the chunks that come may then take
    them itself.
    """

    def __init__(self) -> None:
        self.between = True
        self.done = False
        self.surplus = False
        self._held = b""  # an incomplete chunk line, or the trailers so far
        self._left = 0  # payload and CRLF still to come of the chunk at hand

    def feed(self, data: bytes) -> bytes:
        payload: list[bytes] = []
        if self._left or self._held:
            return self._feed(self._held + data, 0, payload)
        # The usual reads: whole chunks, at a stream's end with the last one, of size 0, behind them.
        position, end = 0, len(data)
        while position < end:
            start = data.find(b"\n", position, position + 5) + 1
            size = SIZES.get(data[position:start], end)  # where it is none of them: beyond the end
            stop = start + size
            if data[stop : stop + 2] != b"\r\n":
                break
            payload.append(data[start:stop])
            position = stop + 2
        if position < end:
            if data[position:] != _LAST_CHUNK:
                return self._feed(data, position, payload)
            self.done, self.between = True, False
        return b"".join(payload)

    def _feed(self, data: bytes, position: int, payload: list[bytes]) -> bytes:
        self._held = b""
        while position < len(data) and not self.done:
            step = self._take if self._left else self._next_chunk
            position = step(data, position, payload)
        self.surplus = self.done and position < len(data)
        self.between = not (self._left or self._held or self.done)
        return b"".join(payload)

    def _take(self, data: bytes, position: int, payload: list[bytes]) -> int:
        """Payload up to the chunk's end, then its CRLF, either of which may be split anywhere."""
        size = self._left - 2
        if size > 0:
            piece = data[position : position + size]
            payload.append(piece)
            self._left -= len(piece)
            return position + len(piece)
        expected = b"\r\n"[2 - self._left :]
        piece = data[position : position + self._left]
        if not expected.startswith(piece):
            raise UpstreamFailure("bad_response", "a chunk is longer than its size")
        self._left -= len(piece)
        return position + len(piece)

    def _next_chunk(self, data: bytes, position: int, _: list[bytes]) -> int:
        line = _CHUNK_LINE.match(data, position)
        if line is None:
            return self._hold_line(data, position)
        size = int(line[1], 16)
        if size == 0:
            return self._trailers(data, position, line.end())
        self._left = size + 2
        return line.end()

    def _hold_line(self, data: bytes, position: int) -> int:
        rest = data[position:]
        if b"\n" in rest or len(rest) > _MAX_CHUNK_LINE:
            raise UpstreamFailure("bad_response", "a chunk has no valid size")
        self._held = rest
        return len(data)

    def _trailers(self, data: bytes, line_start: int, position: int) -> int:
        trailers = _TRAILERS.match(data, position)
        if trailers is not None:
            self.done = True
            return trailers.end()
        if b"\r\n\r\n" in data[position:] or len(data) - position > _MAX_TRAILER_BYTES:
            raise UpstreamFailure("bad_response", "the trailers are broken or too long")
        self._held = data[line_start:]
        return len(data)


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers (names in lower case) of a response, and how its body is framed."""

    status: int
    headers: Mapping[bytes, bytes]
    keep_alive: bool
    framing: Callable[[], Body]

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Heads:
    """Parses heads, and keeps the last: those of one engine differ in the second of their date alone."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Head] = {}

    def parse(self, raw: bytes) -> Head:
        """As `parse_head`."""
        head = self._kept.get(raw)
        if head is None:
            head = parse_head(raw)
            if len(raw) <= _KEPT_HEAD_BYTES:
                if len(self._kept) >= _KEPT_HEADS:
                    self._kept.clear()
                self._kept[raw] = head
        return head


class _Collector:
    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_head(raw: bytes) -> Head:
    """The head in `raw`, which ends with the empty line. Raises UpstreamFailure("bad_response")."""
    collector = _Collector()
    parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        raise UpstreamFailure("bad_response", f"not an HTTP response: {error}") from error
    if not collector.complete:
        raise UpstreamFailure("bad_response", "the head of the response is incomplete")
    status: int = parser.get_status_code()
    framing = _framing(status, collector.headers)
    keep_alive = parser.should_keep_alive() and framing is not EofBody
    return Head(status, collector.headers, keep_alive, framing)


def _framing(status: int, headers: Mapping[bytes, bytes]) -> Callable[[], Body]:
    if status < 200 or status in (204, 304):
        return NoBody
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if coding.strip().lower() != b"chunked":
            raise UpstreamFailure("bad_response", "an unknown transfer-encoding")
        return ChunkedBody
    length = headers.get(b"content-length")
    if length is None:
        return EofBody
    if not _DIGITS.fullmatch(length):
        raise UpstreamFailure("bad_response", "the content-length is no number")
    return functools.partial(LengthBody, int(length))
