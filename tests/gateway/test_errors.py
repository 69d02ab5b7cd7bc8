"""Error bodies: every shape that an engine may send becomes one (FACTS A5), and nothing of ours leaks."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.errors import (
    GatewayError,
    UpstreamFailure,
    chat_error,
    from_engine,
    from_failure,
    openai_error,
)

BODIES = {
    "vLLM": (
        {"error": {"message": "too long", "type": "BadRequestError", "param": "x", "code": 400}},
        "too long",
    ),
    "a string": ({"error": "Unauthorized path"}, "Unauthorized path"),
    "FastAPI": ({"detail": "There was an error parsing the body"}, "There was an error parsing the body"),
    "validation": (
        {"detail": [{"loc": ["body", "messages", 0], "msg": "field required"}, {"msg": "bad"}]},
        "messages.0: field required; bad",
    ),
    "a proxy": ({"message": "upstream sad"}, "upstream sad"),
}


@pytest.mark.parametrize(("body", "message"), BODIES.values(), ids=BODIES.keys())
def test_every_shape_of_an_engine_becomes_one(body: object, message: str) -> None:
    error = from_engine(400, json.dumps(body).encode())
    assert (error.status, error.message, error.type) == (400, message, "invalid_request_error")
    assert set(openai_error(error)) == {"message", "type", "param", "code"}
    assert set(chat_error(error)) == {"message", "type", "code"}


@pytest.mark.parametrize(
    ("status", "becomes", "retry_after"),
    [(400, 400, None), (404, 404, None), (422, 422, None), (429, 429, 1), (401, 502, None), (403, 502, None),
     (500, 502, None), (502, 502, None), (503, 503, 1), (504, 504, None), (302, 502, None)],
)  # fmt: skip
def test_the_status_says_whose_fault_it_is(status: int, becomes: int, retry_after: int | None) -> None:
    error = from_engine(status, b"<html>")
    assert (error.status, error.retry_after) == (becomes, retry_after)
    assert error.message


def test_a_route_that_the_engine_does_not_have_is_not_called_a_missing_model() -> None:
    error = from_engine(404, b'{"error":{"message":"Not Found","type":"NotFoundError","code":404}}')
    assert (error.status, error.code) == (404, "route_not_offered")


def test_an_engines_own_retry_after_is_kept() -> None:
    assert from_engine(503, b"", "7").retry_after == 7
    assert from_engine(503, b"", "Wed, 21 Oct 2026 07:28:00 GMT").retry_after == 1


@given(st.binary(max_size=50), st.integers(300, 599))
def test_no_body_and_no_status_raise(body: bytes, status: int) -> None:
    assert 400 <= from_engine(status, body).status < 600


def test_an_address_stays_in_the_log() -> None:
    error = from_failure(UpstreamFailure("connect", "10.1.2.3:8000: refused", retryable=True))
    assert "10.1.2.3" not in error.message
    assert (error.status, error.retry_after) == (503, 1)


def test_a_long_message_of_an_engine_is_clipped() -> None:
    body = json.dumps({"detail": "x" * 100_000}).encode()
    assert len(from_engine(400, body).message) == 2000


def test_types_follow_openai() -> None:
    types = {status: GatewayError(status, "c", "m").type for status in (418, 429, 500, 503)}
    assert types == {
        418: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "overloaded_error",
    }
