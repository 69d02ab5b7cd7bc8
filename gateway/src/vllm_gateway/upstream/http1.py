"""The response side of HTTP/1.1, as far as an engine needs it (RFC 9112).

httptools reads heads. Bodies are decoded here: a callback of httptools for each chunk costs more than the
whole of what a relay does with it, and vLLM's usual read is exactly one chunk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

import httptools

from vllm_gateway.errors import UpstreamFailure

MAX_HEAD_BYTES = 64 * 1024
_MAX_CHUNK_LINE = 256
_MAX_TRAILER_BYTES = 8 * 1024
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})(?:;[^\r\n]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n)*\r\n")
_DIGITS = re.compile(rb"[0-9]{1,18}")


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
        if not self._left and not self._held:
            line = _CHUNK_LINE.match(data)
            if line is not None:
                start = line.end()
                size = int(line[1], 16)
                if size and start + size + 2 == len(data) and data.endswith(b"\r\n"):
                    return data[start:-2]  # the usual read: one whole chunk
        return self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        data = self._held + data
        self._held = b""
        payload: list[bytes] = []
        position = 0 if self._left else self._whole_chunks(data, payload)
        while position < len(data) and not self.done:
            step = self._take if self._left else self._next_chunk
            position = step(data, position, payload)
        self.surplus = self.done and position < len(data)
        self.between = not (self._left or self._held or self.done)
        return b"".join(payload)

    @staticmethod
    def _whole_chunks(data: bytes, payload: list[bytes]) -> int:
        """Where the chunks end that `data` begins with and holds whole; the last chunk is none of them."""
        position = 0
        while (line := _CHUNK_LINE.match(data, position)) is not None:
            start = line.end()
            end = start + int(line[1], 16)
            if end == start or data[end : end + 2] != b"\r\n":
                break
            payload.append(data[start:end])
            position = end + 2
        return position

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


@dataclass(slots=True)
class Head:
    """Status line and headers (names in lower case) of a response, and how its body is framed."""

    status: int
    headers: dict[bytes, bytes]
    keep_alive: bool
    body: Body = field(repr=False)

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


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
    body = _body_of(status, collector.headers)
    keep_alive = parser.should_keep_alive() and not isinstance(body, EofBody)
    return Head(status, collector.headers, keep_alive, body)


def _body_of(status: int, headers: dict[bytes, bytes]) -> Body:
    if status < 200 or status in (204, 304):
        return NoBody()
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if coding.strip().lower() != b"chunked":
            raise UpstreamFailure("bad_response", "an unknown transfer-encoding")
        return ChunkedBody()
    length = headers.get(b"content-length")
    if length is None:
        return EofBody()
    if not _DIGITS.fullmatch(length):
        raise UpstreamFailure("bad_response", "the content-length is no number")
    return LengthBody(int(length))
