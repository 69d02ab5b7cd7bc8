"""What a request may be: its declared type and size, and the id that it may bring along."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from vllm_gateway.errors import GatewayError

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_DIGITS = re.compile(rb"[0-9]{1,18}")


JSON = b"application/json"


def check_declared(headers: Mapping[bytes, bytes], max_bytes: int, wanted: bytes = JSON) -> None:
    """Refuses by the headers alone what need not be read: not of type `wanted` (415), too much (413)."""
    kind = headers.get(b"content-type", b"")
    if kind != wanted and kind.split(b";", 1)[0].strip().lower() != wanted:
        text = f"Send the body as content-type: {wanted.decode()}."
        raise GatewayError(415, "unsupported_media_type", text)
    coding = headers.get(b"content-encoding")
    if coding is not None and coding.strip().lower() != b"identity":
        raise GatewayError(415, "unsupported_media_type", "Send the body without content-encoding.")
    length = headers.get(b"content-length")
    if length is not None and _DIGITS.fullmatch(length) and int(length) > max_bytes:
        raise body_too_large(max_bytes)


def body_too_large(max_bytes: int) -> GatewayError:
    return GatewayError(413, "body_too_large", f"The body is larger than {max_bytes} bytes.")


def body_too_slow(seconds: float) -> GatewayError:
    return GatewayError(408, "body_too_slow", f"The body did not arrive within {seconds:g} s.")


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's `x-request-id` if it is at most 128 printable characters, a new one otherwise."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return os.urandom(16).hex()
