"""A stream's token events: counted, timed, and the usual read passed on in as few steps as may be.

`Tokens.tap` runs for every event of every stream, and what it does is most of what this gateway adds to a
splice of two sockets. So it keeps to one frame, and looks at each fact with one call into C (`make bench`:
the slope).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from vllm_gateway.telemetry import GAP_BOUNDS, Gaps
from vllm_gateway.upstream.sse import Events, last_event
from vllm_gateway.upstream.template import Template, learn
from vllm_gateway.web.channel import Channel
from vllm_gateway.web.dialect import Account, Shape, Shortcut, StreamDialect

_LESSONS = 8
_LAST_SHORT_LINE = 4 + 0xFF + 2  # the longest chunk whose size has two digits, with its framing
_FRAMES = 24  # tokens of a stream have few lengths, and each takes 300 bytes
_NONE = Shortcut()


class Tokens:
    """One stream's. `last` is the loop's time of the last token, or of what counts as progress."""

    __slots__ = (
        "_account",
        "_channel",
        "_direct",
        "_events",
        "_frames",
        "_gaps",
        "_lessons",
        "_now",
        "_open",
        "_quick",
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
        self._open = True
        self.last = last
        self._template: Template | None = None
        self._direct: Callable[[bytes], None] | None = None
        self._quick = False
        self._shape: Shape | None = None
        self._suffix = b""
        self._frames: dict[int, tuple[bytes, int, int]] = {}

    def tap(self, data: bytes) -> int:
        """Ordinary token events, from one connection to the other: how many bytes of a read it has taken.

        A read that is one chunk with one event is looked at here; all others go through `Template.scan`,
        which knows the same template.
        """
        direct, size = self._direct, len(data)
        frame = self._frames.get(size)
        if direct is None or frame is None or not self._open:
            return self._scan(data)
        head, start, tail = frame
        # The first quote after the text's begin is the one that ends it: nothing but a text is in between.
        if not (data.startswith(head) and data.endswith(self._suffix)) or data.find(b'"', start) != tail:
            return self._scan(data)
        shape = self._shape
        if shape is None:
            direct(data)
        else:
            text = data[start:tail]
            if not shape.fits(text):
                return self._scan(data)
            direct(b"%x\r\n%b%b%b\r\n" % (shape.around + len(text), shape.head, text, shape.foot))
        now, gaps = self._now(), self._gaps
        gap = now - self.last
        gaps.counts[bisect_left(GAP_BOUNDS, gap)] += 1
        gaps.total += gap
        self._account.token_events += 1
        self.last = now
        return size

    def _scan(self, data: bytes) -> int:
        template = self._template
        if template is None or not self._open:
            return 0
        taken, texts = template.scan(data)
        if not texts:
            return 0
        if self._shortcut.verbatim:
            self._channel.forward(data if taken == len(data) else data[:taken])
        elif sent := self._shortcut.rewrite(template.key, texts):
            self._channel.write(sent)
        self.count(len(texts))
        if len(texts) == 1 and taken == len(data):
            self._remember(template, taken)
        return taken

    def _remember(self, template: Template, size: int) -> None:
        """How a read of this size begins, and where its text begins and ends."""
        if self._direct is None and self._quick:  # at the first, the caller's head may not have gone out
            self._direct = self._channel.direct()
        if self._direct is not None and len(self._frames) < _FRAMES:
            payload = size - (6 if size <= _LAST_SHORT_LINE else 7)
            head = b"%x\r\n%b" % (payload, template.prefix)
            self._frames[size] = (head, len(head), size - len(self._suffix))

    def look(self) -> None:
        """After a read that did not come through the tap: whether the next one may."""
        self._open = self._events.between and not self._shortcut.holds

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
        self._template, self._direct, self._quick, self._lessons = None, None, False, 0

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
        self._suffix = template.suffix + b"\r\n"
        self._frames.clear()
        self._shape = shortcut.shape(template.key)
        self._direct, self._quick = None, shortcut.verbatim or self._shape is not None
