"""A stream's token events: counted, timed, and the usual read passed on in as few steps as may be.

`Tokens.tap` runs for every event of every stream, and what it does is most of what this gateway adds to a
splice of two sockets. So it keeps to one frame, looks at each fact with one call into C, and searches the
bucket of a gap only where that is not the one of the gap before (`make bench`: the slope).
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_gateway.telemetry import Gaps, bucket_of
from vllm_gateway.upstream.sse import Events, last_event
from vllm_gateway.upstream.template import Template, learn
from vllm_gateway.web.channel import Channel
from vllm_gateway.web.dialect import Account, Shape, Shortcut, StreamDialect

_LESSONS = 8
_MAX_READ = 4096
_LAST_SHORT_LINE = 4 + 0xFF + 2  # the longest chunk whose size has two digits, with its framing
_BACKSLASH = ord("\\")
_NONE = Shortcut()


def _size_line(read: int) -> bytes:
    """How a read begins that is one whole chunk; nothing begins so where no chunk has this size."""
    size = read - (6 if read <= _LAST_SHORT_LINE else 7)
    line = b"%x\r\n" % size if size >= 0x10 else b"\0"
    return line if len(line) + size + 2 == read else b"\0"


_SIZE_LINES = tuple(map(_size_line, range(_MAX_READ + 1)))


class Tokens:
    """One stream's. `last` is the loop's time of the last token, or of what counts as progress."""

    __slots__ = (
        "_account",
        "_after",
        "_before",
        "_bucket",
        "_channel",
        "_direct",
        "_events",
        "_gaps",
        "_high",
        "_lessons",
        "_low",
        "_now",
        "_prefix",
        "_shape",
        "_shortcut",
        "_suffix",
        "_template",
        "last",
    )

    def __init__(
        self,
        channel: Channel,
        events: Events,
        dialect: StreamDialect,
        gaps: Gaps,
        now: Callable[[], float],
        last: float,
    ) -> None:
        self._channel = channel
        self._events = events
        self._account: Account = dialect.account
        self._shortcut = dialect if isinstance(dialect, Shortcut) else _NONE
        self._lessons = 0 if self._shortcut is _NONE else _LESSONS
        self._gaps = gaps
        self._now = now
        self.last = last
        self._template: Template | None = None
        self._direct: Callable[[bytes], None] | None = None
        self._shape: Shape | None = None
        self._prefix = self._suffix = b""
        self._before = self._after = 0
        self._bucket, self._low, self._high = bucket_of(0.0)

    def tap(self, data: bytes) -> int:
        """Ordinary token events, from one connection to the other: how many bytes of a read it has taken.

        A read that is one chunk with one event is looked at here; all others go through `Template.scan`,
        which knows the same template.
        """
        direct = self._direct
        if direct is None or not self._events.between:
            return self._scan(data)
        size = len(data)
        begin = 4 if size <= _LAST_SHORT_LINE else 5
        start = begin + self._before
        tail = size - self._after
        if (
            size > _MAX_READ
            or not data.startswith(self._prefix, begin)
            or not data.startswith(_SIZE_LINES[size])
            or data.find(b'"', start) != tail
            or data.find(b"\n", start) != size - 4
            or data[tail - 1] == _BACKSLASH
            or not data.endswith(self._suffix)
        ):
            return self._scan(data)
        shape = self._shape
        if shape is None:
            direct(data)
        else:
            text = data[start:tail]
            if not shape.fits(text):
                return self._scan(data)
            head, foot = shape.head, shape.foot
            direct(b"%x\r\n%b%b%b\r\n" % (len(head) + len(text) + len(foot), head, text, foot))
        now = self._now()
        gap = now - self.last
        if not self._low < gap <= self._high:
            self._bucket, self._low, self._high = bucket_of(gap)
        self._gaps.counts[self._bucket] += 1
        self._gaps.total += gap
        self._account.token_events += 1
        self.last = now
        return size

    def _scan(self, data: bytes) -> int:
        template = self._template
        if template is None or not self._events.between:
            return 0
        taken, texts = template.scan(data)
        if not texts:
            return 0
        if self._shortcut.verbatim:
            self._channel.forward(data if taken == len(data) else data[:taken])
        elif sent := self._shortcut.rewrite(template.key, texts):
            self._channel.write(sent)
        self.count(len(texts))
        return taken

    def first(self, block: bytes) -> None:
        """The first token has come: there is no gap before it."""
        self.last = self._now()
        self._account.token_events += block.count(b"\n\n")
        self._learn(block)

    def more(self, block: bytes) -> None:
        """Further tokens that did not come through the tap."""
        self.count(block.count(b"\n\n"))
        self._learn(block)

    def count(self, events: int) -> None:
        now = self._now()
        self._gaps.after(now - self.last, events)
        self._account.token_events += events
        self.last = now

    def close(self) -> None:
        """Nothing is passed on any more."""
        self._template, self._direct, self._lessons = None, None, 0

    def _learn(self, block: bytes) -> None:
        """Looks how the engine's token events are made, a few times: not all streams have a template."""
        shortcut, channel = self._shortcut, self._channel
        if not self._lessons or not (channel.forwards or not shortcut.verbatim):
            return
        self._lessons -= 1
        template = learn(last_event(block))
        if template is None:
            return
        self._template = template
        self._prefix, self._suffix = template.prefix, template.suffix + b"\r\n"
        self._before, self._after = len(template.prefix), len(self._suffix)
        self._shape = shortcut.shape(template.key)
        self._direct = channel.direct() if shortcut.verbatim or self._shape is not None else None
