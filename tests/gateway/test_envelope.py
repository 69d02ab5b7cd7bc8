"""Finding and splicing top-level keys of a body without decoding it.

Proves: for any JSON object, in any spelling, the values found are those that Python's parser finds (vLLM
uses it); a key that stands twice is refused however it is escaped; a splice changes nothing else; what is
no JSON never raises anything but a 400; depth and count are bounded.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.envelope import Span, decode, find, prepend, splice

KEYS = frozenset({"model", "stream", "stream_options"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)
OBJECTS = st.dictionaries(
    st.sampled_from([*KEYS, "messages", 'a"b', "\\", "{"]) | st.text(), JSON, max_size=6
)
SPACES = st.sampled_from(["", " ", "\n", "\t\r\n "])


LARGE = b" " * 16 * 1024  # a body with this is walked over


def outcome(body: bytes) -> dict[str, Span] | str:
    try:
        return find(body, KEYS, max_depth=10, max_items=100_000)
    except GatewayError as error:
        return error.code


def found(body: bytes) -> dict[str, Any]:
    spans = find(body, KEYS, max_depth=100, max_items=10_000)
    assert find(body + LARGE, KEYS, max_depth=100, max_items=10_000) == spans
    return {key: decode(body, span, key) for key, span in spans.items()}


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1, "\t"]), SPACES)
def test_what_is_found_is_what_pythons_parser_finds(
    document: dict[str, Any], ascii_only: bool, indent: Any, space: str
) -> None:
    text = space + json.dumps(document, ensure_ascii=ascii_only, indent=indent) + space
    try:
        body = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot hold
        return
    assert found(body) == {key: value for key, value in document.items() if key in KEYS}


@given(OBJECTS, JSON)
def test_a_splice_changes_one_value_and_nothing_else(document: dict[str, Any], value: Any) -> None:
    document |= {"model": "m"}
    body = json.dumps(document).encode()
    span = find(body, KEYS, max_depth=100, max_items=10_000)["model"]
    changed = splice(body, [(span, json.dumps(value).encode()), prepend(body, b'"x":1')])
    assert json.loads(changed) == {"x": 1, **document, "model": value} | (
        {"x": document["x"]} if "x" in document else {}
    )
    assert splice(body, [(span, body[span.start : span.end])]) == body


@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from([b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b'"model"', b"1", b" "]),
        max_size=20,
    ).map(b"".join)
)
def test_no_bytes_raise_anything_but_a_400(body: bytes) -> None:
    assert outcome(body) == outcome(body + LARGE)
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    try:
        spans = find(body, KEYS, max_depth=10, max_items=100)
    except GatewayError as error:
        status = error.status
        assert status == 400
        return
    if document is not None:  # the grammar inside values is the engine's business
        assert set(spans) == set(document) & KEYS


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","x":{"model":1},"\\u006dodel":"b"}',
        b'{"stream":true, "stream" : true}',
    ],
)
def test_a_key_that_stands_twice_is_refused(body: bytes) -> None:
    with pytest.raises(GatewayError, match="twice"):
        find(body, KEYS, max_depth=10, max_items=100)


def test_the_same_key_further_in_is_not_the_models_business() -> None:
    body = b'{"messages":[{"model":"x","stream":1}],"model":"m","tools":[{"model":"y"}]}'
    assert found(body) == {"model": "m"}


@pytest.mark.parametrize("depth", [10, 11])
def test_depth_counts_from_the_outermost_object(depth: int) -> None:
    body = b'{"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    if depth <= 10:
        assert find(body, KEYS, max_depth=10, max_items=100) == {}
    else:
        with pytest.raises(GatewayError, match="deeper than 10"):
            find(body, KEYS, max_depth=10, max_items=100)


def test_text_full_of_escaped_quotes_and_brackets_is_one_item() -> None:
    text = '\\"{[' * 100_000
    body = json.dumps({"messages": [{"content": text}], "model": "m"}).encode()
    spans = find(body, KEYS, max_depth=5, max_items=20)
    assert decode(body, spans["model"], "model") == "m"


def test_a_mark_before_the_object_is_refused() -> None:
    with pytest.raises(GatewayError, match="UTF-8"):
        find(b'\xef\xbb\xbf{"model":"m"}', KEYS, max_depth=10, max_items=100)
