"""The response side of HTTP/1.1, against httptools as an oracle.

Proves: a chunked body decodes to the same bytes however it is split into reads; what httptools refuses is
never taken for a body; heads and the framing that they announce.
"""

from __future__ import annotations

import itertools
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.errors import UpstreamFailure
from vllm_gateway.upstream.http1 import ChunkedBody, EofBody, LengthBody, NoBody, parse_head

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
EXTENSIONS = st.sampled_from([b"", b";a=b", b";x"])
TRAILERS = st.sampled_from([b"", b"x: y\r\n", b"x: y\r\nz: 1\r\n"])


def encode(chunks: list[bytes], extension: bytes, trailers: bytes) -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return body + b"0" + extension + b"\r\n" + trailers + b"\r\n"


def cut(data: bytes, points: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


@given(CHUNKS, EXTENSIONS, TRAILERS, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_a_chunked_body_gives_the_same_bytes(
    chunks: list[bytes], extension: bytes, trailers: bytes, points: list[int]
) -> None:
    body = ChunkedBody()
    reads = cut(encode(chunks, extension, trailers), points)
    assert b"".join(body.feed(read) for read in reads) == b"".join(chunks)
    assert body.done
    assert not body.surplus


@given(CHUNKS, st.binary(min_size=1, max_size=20))
def test_bytes_after_the_end_are_surplus_and_no_payload(chunks: list[bytes], more: bytes) -> None:
    body = ChunkedBody()
    assert body.feed(encode(chunks, b"", b"") + more) == b"".join(chunks)
    assert body.done
    assert body.surplus


class Oracle:
    def __init__(self) -> None:
        self.payload = b""
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.payload += data

    def on_message_complete(self) -> None:
        self.complete = True


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@given(
    st.lists(
        st.sampled_from([b"1", b"a", b"0", b"\r\n", b"\r", b"\n", b"x", b" ", b";", b"5\r\nhello"]),
        max_size=12,
    )
)
def test_whatever_httptools_refuses_is_refused_or_left_incomplete(tokens: list[bytes]) -> None:
    data = b"".join(tokens)
    oracle = Oracle()
    parser = httptools.HttpResponseParser(oracle)
    parser.feed_data(HEAD)
    body = ChunkedBody()
    try:
        payload = body.feed(data)
    except UpstreamFailure:
        return  # stricter than httptools may be; taking what it refuses may not
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        assert not body.done or body.surplus
        return
    if body.done:
        assert payload == oracle.payload


@pytest.mark.parametrize("size", [b"-1", b"0x1", b"1_0", b"+1", b"123456789", b"g", b" 1", b""])
def test_sizes_are_one_to_eight_hex_digits(size: bytes) -> None:
    with pytest.raises(UpstreamFailure, match="no valid size"):
        ChunkedBody().feed(size + b"\r\nx\r\n")


@pytest.mark.parametrize("data", [b"1" * 300, b"1;" + b"x" * 300, b"2\r\nabc\r\n", b"2\r\nab\rx"])
def test_lines_without_end_and_chunks_over_their_size_are_refused(data: bytes) -> None:
    with pytest.raises(UpstreamFailure) as caught:
        ChunkedBody().feed(data)
    assert caught.value.reason == "bad_response"


def test_trailers_are_bounded() -> None:
    with pytest.raises(UpstreamFailure, match="trailers"):
        ChunkedBody().feed(b"0\r\nx: " + b"y" * 10_000)


HEADS: dict[str, tuple[bytes, type[Any], bool]] = {
    "chunked": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", ChunkedBody, True),
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", LengthBody, True),
    "closed": (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\n", LengthBody, False),
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\n", EofBody, False),
    "nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", NoBody, True),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\n", LengthBody, False),
}


@pytest.mark.parametrize(("raw", "body", "keep_alive"), HEADS.values(), ids=HEADS.keys())
def test_a_head_says_how_its_body_is_framed(raw: bytes, body: type[Any], keep_alive: bool) -> None:
    head = parse_head(raw)
    assert isinstance(head.framing(), body)
    assert head.keep_alive is keep_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_a_head_that_could_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(UpstreamFailure) as caught:
        parse_head(raw)
    assert caught.value.reason == "bad_response"


def test_a_length_body_ends_where_it_says() -> None:
    body = LengthBody(5)
    assert (body.feed(b"he"), body.done) == (b"he", False)
    assert (body.feed(b"llo!"), body.done, body.surplus) == (b"llo", True, True)
