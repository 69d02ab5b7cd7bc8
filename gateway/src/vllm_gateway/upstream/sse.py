"""Server-sent events as bytes: where they end, and what is in the few that matter.

An event ends with an empty line; a line ends with LF, CRLF or CR
(https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream).

Bytes are looked for with `find` where each request comes by: for `in` CPython first tries to take them for a
number, and makes and drops a TypeError with its text.
"""

from __future__ import annotations

import re

MAX_HELD = 64 * 1024
_EMPTY_LINES = (b"\n\n", b"\n\r\n", b"\r\r")
_EVENT_END = re.compile(rb"\n\n|\n\r\n|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Events:
    """Cuts a stream into blocks of whole events, whatever the reads were.

    An incomplete event is held, at most `MAX_HELD` bytes of it: a larger one is let through in pieces
    (`inside` is then true until its end), so that memory is bounded. `between` is true where the next byte is
    an event's first.
    """

    __slots__ = ("_held", "between", "inside")

    def __init__(self) -> None:
        self._held = b""
        self.inside = False
        self.between = True

    def feed(self, data: bytes) -> bytes:
        """Everything up to the last whole event's end; `b""` if there is none yet."""
        if not self._held and data.endswith(b"\n\n"):
            self.inside, self.between = False, True
            return data
        return self._cut(self._held + data)

    def _cut(self, data: bytes) -> bytes:
        end = last_event_end(data)
        if end:
            self.inside = False
        if len(data) - end > MAX_HELD:
            self.inside, self._held, self.between = True, b"", False
            return data
        self._held = data[end:]
        self.between = not (self._held or self.inside)
        return data[:end]

    def rest(self) -> bytes:
        """What is left of an event that never ended; per the specification a reader discards it."""
        held, self._held = self._held, b""
        return held


def last_event_end(data: bytes) -> int:
    """The index after the last empty line; 0 if there is none."""
    ends = ((data.rfind(line), len(line)) for line in _EMPTY_LINES)
    return max((at + size for at, size in ends if at >= 0), default=0)


def split(block: bytes) -> list[bytes]:
    """The events of a block of whole events, each with its empty line, in order and without loss."""
    events, start = [], 0
    if block.find(b"\r") < 0:  # as vLLM writes it
        while (end := block.find(b"\n\n", start) + 2) > 1:
            events.append(block[start:end])
            start = end
    else:
        for found in _EVENT_END.finditer(block):
            events.append(block[start : found.end()])
            start = found.end()
    if start < len(block):
        events.append(block[start:])
    return events


def last_event(block: bytes) -> bytes:
    """The last event of a block of whole events that end as vLLM's do."""
    before = block.rfind(b"\n\n", 0, -2)
    return block[before + 2 :] if before >= 0 else block


def data_of(event: bytes) -> bytes | None:
    """The event's data, its lines joined by LF; None for a comment or an event without data."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and event.endswith(b"\n\n"):
        return event[6:-2]  # vLLM's form: one line
    lines = [line for line in _LINE_END.split(event) if line.startswith(b"data")]
    values = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return b"\n".join(values) if values else None


def has_data(block: bytes) -> bool:
    """Whether a block has more than comments: only then an engine has made progress."""
    if block.startswith(b"data:"):
        return True
    return b"\ndata:" in block or b"\rdata:" in block
