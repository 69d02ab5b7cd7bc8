"""Finds the few top-level keys of a JSON body that the gateway acts on, and replaces their bytes in place.

The body is never decoded and encoded again: it reaches the engine byte for byte but for what is spliced.
What is read here must be what the engine reads. So a key written twice is refused (Python's parser takes
the last, others the first), escaped keys are decoded, and UTF-16, which Python's parser would accept from
bytes, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from vllm_gateway.errors import GatewayError, bad_request
from vllm_gateway.json_value import json_value

_STRUCTURE = re.compile(rb'["{}\[\]]')
_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+', re.DOTALL)
_PLAIN_KEY = re.compile(rb'[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*')
# The usual list: of flat objects, three levels deep with the body's own.
_FLAT = rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+'
_FLAT_OBJECT = rb"\{" + _FLAT + rb"\}"
_FLAT_LIST = rb"\[" + _FLAT + rb"(?:" + _FLAT_OBJECT + _FLAT + rb")*+\]"
_LIST = re.compile(_FLAT_LIST, re.DOTALL)
_LIST_DEPTH = 3
# The usual member, in a small body: its value is a string, a number, a word, a flat object or the usual list.
_MEMBER = re.compile(
    rb'[ \t\r\n]*+"([^"\\\x00-\x1f\x80-\xff]*+)"[ \t\r\n]*+:[ \t\r\n]*+'
    rb"((?:" + _STRING + rb"|" + _FLAT_LIST + rb"|" + _FLAT_OBJECT + rb'|[^ \t\r\n,:"\\{}\[\]]++))'
    rb"[ \t\r\n]*+([,}])",
    re.DOTALL,
)
_SMALL = 16 * 1024
_SEPARATOR = re.compile(rb"[ \t\r\n]*([,}])")
_SCALAR_END = re.compile(rb"[ \t\r\n,}\]]|$")
_OPENERS = frozenset(b"{[")
_QUOTE = ord('"')
_BACKSLASH = ord("\\")


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class Span:
    """Where a top-level value stands in the body: `body[start:end]`."""

    start: int
    end: int


def find(body: bytes, keys: Collection[str], *, max_depth: int, max_items: int) -> dict[str, Span]:
    """The spans of the values of `keys` at the top level. Raises a 400 that says what is wrong.

    It checks what it walks over, not the whole grammar: the engine does that.
    """
    if len(body) <= _SMALL and len(body) <= max_items and max_depth >= _LIST_DEPTH and body.find(b"\0") < 0:
        spans = _usual(body, keys)
        if spans is not None:
            return spans
    start = _space(body, 0)
    if body[start : start + 1] != b"{" or b"\0" in body:
        raise bad_request("The body must be a JSON object in UTF-8.", code="invalid_json")
    walk = _Walk(body, start, max_depth, max_items)
    spans = {}
    for key, span in walk.members():
        if key in keys:
            if key in spans:
                raise bad_request(f"The key {key!r} stands twice in the body.", param=key)
            spans[key] = span
    return spans


def _usual(body: bytes, keys: Collection[str]) -> dict[str, Span] | None:
    """The same for a body of usual members; None where it has others, or something is wrong with it."""
    if not body.startswith(b"{"):
        return None
    spans: dict[str, Span] = {}
    at, more = 1, b","
    while more == b",":
        member = _MEMBER.match(body, at)
        if member is None:
            return None
        key = member[1].decode()
        if key in keys:
            if key in spans:
                return None
            spans[key] = Span(*member.span(2))
        at, more = member.end(), member[3]
    return spans if at == len(body) else None


def splice(body: bytes, changes: Sequence[tuple[Span, bytes]]) -> bytes:
    """The body with each span replaced."""
    if len(changes) == 1:
        ((span, value),) = changes
        return b"".join((body[: span.start], value, body[span.end :]))
    pieces: list[bytes] = []
    position = 0
    for span, value in sorted(changes, key=lambda change: change[0].start):
        pieces += (body[position : span.start], value)
        position = span.end
    return b"".join((*pieces, body[position:]))


def prepend(body: bytes, member: bytes) -> tuple[Span, bytes]:
    """The change that adds a member (`"key":value`) to an object."""
    at = body.index(b"{") + 1
    empty = not body.startswith(b'"', at) and body.startswith(b"}", _space(body, at))
    return Span(at, at), member if empty else member + b","


def decode(body: bytes, span: Span, key: str) -> object:
    """The value at `span`. Raises a 400."""
    try:
        return json_value(body[span.start : span.end])
    except (ValueError, RecursionError):
        raise bad_request(f"The value of {key!r} is not valid JSON.", param=key) from None


class _Walk:
    """Walks a body's strings and brackets, jumping from one to the next."""

    def __init__(self, body: bytes, start: int, max_depth: int, max_items: int) -> None:
        self._body = body
        self._at = start
        self._max_depth = max_depth
        self._items_left = max_items
        # At least as many as there are; where even these are few enough, no item needs to be counted.
        most = body.count(b'"') // 2 + body.count(b"{") + body.count(b"[")
        self._counts = most > max_items

    def members(self) -> Iterable[tuple[str, Span]]:
        """The top-level members in order; checks that nothing follows the object."""
        body, more = self._body, b","
        self._at += 1
        first = _space(body, self._at)
        if body[first : first + 1] == b"}":
            self._at, more = first + 1, b"}"
        while more == b",":
            key = self._key()
            start = self._at
            self._skip_value()
            yield key, Span(start, self._at)
            separator = _SEPARATOR.match(body, self._at)
            if separator is None:
                raise _broken(self._at)
            self._at, more = separator.end(), separator[1]
        if _space(body, self._at) != len(body):
            raise _broken(self._at)

    def _peek(self) -> bytes:
        return self._body[self._at : self._at + 1]

    def _key(self) -> str:
        plain = _PLAIN_KEY.match(self._body, self._at)
        if plain is not None and plain[1].isascii():
            self._count()
            self._at = plain.end()
            return plain[1].decode()
        self._at = _space(self._body, self._at)
        if self._peek() != b'"':
            raise _broken(self._at)
        start, end = self._at, self._string_end(self._at)
        try:
            key = json.loads(self._body[start:end])
        except ValueError:
            raise _broken(start) from None
        self._at = _space(self._body, end)
        if self._peek() != b":":
            raise _broken(self._at)
        self._at = _space(self._body, self._at + 1)
        return str(key)

    def _skip_value(self) -> None:
        first = self._peek()
        if first == b'"':
            self._at = self._string_end(self._at)
        elif first in (b"{", b"["):
            self._skip_container()
        else:
            end = _SCALAR_END.search(self._body, self._at)
            if end is None or end.start() == self._at:
                raise _broken(self._at)
            self._at = end.start()

    def _skip_container(self) -> None:
        """From an opening bracket to after the one that closes it."""
        body, at, depth = self._body, self._at, 1
        flat = _LIST.match(body, at) if not self._counts and self._max_depth >= _LIST_DEPTH else None
        if flat is not None:
            self._at = flat.end()
            return
        while True:
            if not self._counts:
                at = self._to_bracket(at)
            found = _STRUCTURE.search(body, at)
            if found is None:
                raise _broken(len(body))
            at = found.start()
            byte = body[at]
            if byte == _QUOTE:
                at = self._string_end(at)
            elif byte in _OPENERS:
                self._count()
                depth += 1
                at += 1
                if depth > self._max_depth:
                    text = f"The body is nested deeper than {self._max_depth} levels."
                    raise bad_request(text, code="json_too_deep")
            else:
                depth -= 1
                at += 1
                if depth == 1:
                    self._at = at
                    return

    def _to_bracket(self, at: int) -> int:
        """The index of the next bracket outside strings, or of a string that does not end."""
        found = _TO_BRACKET.match(self._body, at)
        return found.end() if found is not None else at

    def _string_end(self, at: int) -> int:
        """The index after the string that begins at `at`."""
        body = self._body
        self._count()
        end = body.find(b'"', at + 1)  # the fastest way over a string without escaped quotes
        if end < 0:
            raise _broken(len(body))
        if body[end - 1] != _BACKSLASH or end - 1 == at:
            return end + 1
        found = _STRING_REST.match(body, at + 1)
        if found is None:
            raise _broken(len(body))
        return found.end()

    def _count(self) -> None:
        self._items_left -= 1
        if self._items_left < 0:
            raise bad_request("The body has too many strings, arrays and objects.", code="json_too_large")


def _space(body: bytes, at: int) -> int:
    found = _SPACE.match(body, at)
    return found.end() if found is not None else at


def _broken(at: int) -> GatewayError:
    return bad_request(f"The body is not valid JSON (at byte {at}).", code="invalid_json")
