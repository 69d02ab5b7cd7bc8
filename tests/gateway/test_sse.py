"""Server-sent events as bytes.

Proves: any split of any stream comes out unchanged and only in whole events; memory is bounded; events,
their data and comments are told apart for every line end that the specification allows.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.upstream.sse import MAX_HELD, Events, data_of, has_data, last_event_end, split

PARTS = st.sampled_from(
    [
        b"data: x",
        b"data: {}",
        b": ping",
        b"event: e",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\n\r\n",
        b"\xf0\x9f",
        b"d",
    ]
)


@given(st.lists(PARTS, max_size=30), st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_any_split_of_any_stream_comes_out_unchanged_and_in_whole_events(
    parts: list[bytes], sizes: list[int]
) -> None:
    whole = b"".join(parts)
    events, out, at = Events(), [], 0
    for size in sizes * (len(whole) // sum(sizes) + 1):
        block = events.feed(whole[at : at + size])
        at += size
        assert not block or last_event_end(block) == len(block)
        out.append(block)
    sent = b"".join(out)
    assert sent + events.rest() == whole
    # What a whole read would have released too, but for further empty lines: they end nothing.
    assert not whole[len(sent) : last_event_end(whole)].strip(b"\r\n")


@given(st.lists(PARTS, max_size=30))
def test_a_block_splits_into_its_events_without_loss(parts: list[bytes]) -> None:
    block = b"".join(parts)
    assert b"".join(split(block)) == block


@given(st.lists(st.text(alphabet='ab :"\\é', min_size=1, max_size=10), min_size=1, max_size=6))
def test_the_data_of_every_event_is_found(texts: list[str]) -> None:
    block = b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)
    assert [data_of(event) for event in split(block)] == [text.encode() for text in texts]


def test_an_event_without_end_is_let_through_in_pieces_and_marked() -> None:
    events = Events()
    sent = b""
    for _ in range(100):
        sent += events.feed(b"x" * 10_000)
    assert 1_000_000 - len(sent) <= MAX_HELD
    inside = [events.inside]
    sent += events.feed(b"\n\n")
    assert [*inside, events.inside] == [True, False]
    assert len(sent) == 1_000_002


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"])
def test_every_line_end_of_the_specification_ends_an_event(end: bytes) -> None:
    events = Events()
    assert events.feed(b"data: a" + end + b"data: b") == b"data: a" + end
    assert events.rest() == b"data: b"


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: x\r\n\r\n", b"x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"event: e\ndata: x\nid: 1\n\n", b"x"),
        (b": comment\n\n", None),
        (b": comment\ndata: x\n\n", b"x"),
        (b"dataset: x\n\n", None),
        (b"event: e\n\n", None),
        (b"data:\n\n", b""),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


def test_comments_alone_are_no_progress() -> None:
    assert not has_data(b": ping\n\n: data: x\n\n")
    assert has_data(b": ping\n\ndata: x\n\n")
    assert has_data(b": ping\r\rdata: x\r\r")
