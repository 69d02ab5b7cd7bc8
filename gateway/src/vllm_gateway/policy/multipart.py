"""Finds the few fields of a `multipart/form-data` body that the gateway acts on, and replaces their bytes.

Uploaded audio reaches the engine byte for byte. What is read here must be what the engine reads, so anything
that two readers could take differently is refused: a field that stands twice, a header that is not in the
plain form which every client writes. https://www.rfc-editor.org/rfc/rfc7578
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from vllm_gateway.errors import GatewayError, bad_request
from vllm_gateway.policy.envelope import Span

KIND = b"multipart/form-data"
_BOUNDARY = re.compile(
    rb"""multipart/form-data\s*;\s*boundary=("?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1""", re.IGNORECASE
)
_DISPOSITION = re.compile(
    rb'content-disposition:[ \t]*form-data;[ \t]*name="([^"\\\r\n]*)"'
    rb"((?:;[ \t]*filename\*?=[^\r\n]*)?)[ \t]*",
    re.IGNORECASE,
)
_UNCLEAR = re.compile(rb"^[ \t]|[\r\n\0]")  # a line that goes on, or ends in a way of its own
_MAX_PARTS = 100
_MAX_HEADER = 4096
_MAX_FIELD = 512


@dataclass(frozen=True, slots=True)
class Form:
    """The fields that were found, and where another part may be put in."""

    boundary: bytes
    fields: dict[str, Span]
    end: int

    def value(self, body: bytes, name: str) -> str | None:
        """A field's text. Raises a 400."""
        span = self.fields.get(name)
        if span is None:
            return None
        if span.end - span.start > _MAX_FIELD:
            raise bad_request(f"The field {name!r} is longer than {_MAX_FIELD} bytes.", param=name)
        try:
            return body[span.start : span.end].decode()
        except UnicodeDecodeError:
            raise bad_request(f"The field {name!r} is not UTF-8.", param=name) from None

    def addition(self, name: str, value: str) -> tuple[Span, bytes]:
        """The change that adds a field."""
        part = f'\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--'.encode()
        return Span(self.end, self.end), part + self.boundary


def boundary_of(content_type: bytes) -> bytes:
    """The boundary that a content type declares. Raises a 400."""
    found = _BOUNDARY.fullmatch(content_type.strip())
    if found is None:
        raise bad_request(
            "The content-type must be multipart/form-data with a boundary.", code="invalid_form"
        )
    return found[2]


def find(body: bytes, boundary: bytes, names: Collection[str]) -> Form:
    """The values of the fields `names`. Raises a 400 that says what is wrong."""
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        raise _broken("it does not begin with its boundary")
    fields: dict[str, Span] = {}
    at = len(delimiter)
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", at):
            return Form(boundary, fields, at)
        name, span = _part(body, at, b"\r\n" + delimiter)
        if name in names:
            if name in fields:
                raise bad_request(f"The field {name!r} stands twice in the form.", param=name)
            fields[name] = span
        at = span.end + 2 + len(delimiter)
    raise _broken(f"it has more than {_MAX_PARTS} parts")


def _part(body: bytes, at: int, delimiter: bytes) -> tuple[str, Span]:
    """The name and the content of the part whose boundary ends at `at`; the name of a file is empty."""
    start = body.find(b"\r\n\r\n", at, at + _MAX_HEADER)
    if not body.startswith(b"\r\n", at) or start < 0:
        raise _broken("a part has no header")
    lines = body[at + 2 : start].split(b"\r\n")
    named = [found for line in lines if (found := _DISPOSITION.fullmatch(line))]
    others = sum(line.lower().startswith(b"content-disposition") for line in lines) - len(named)
    if len(named) != 1 or others or any(_UNCLEAR.search(line) for line in lines):
        raise _broken('a part needs one header Content-Disposition: form-data; name="…"')
    end = body.find(delimiter, start + 4)
    if end < 0:
        raise _broken("its last boundary is missing")
    name = b"" if named[0][2] else named[0][1]
    return name.decode("latin-1"), Span(start + 4, end)


def _broken(what: str) -> GatewayError:
    return bad_request(f"The body is no valid multipart form: {what}.", code="invalid_form")
