"""A stream's token events: counted, timed, and the usual read passed on in as few steps as may be.

`Tokens.data_received` runs for every event of every stream, and what it does is most of what this gateway
adds to a splice of two sockets. So it keeps to one frame, looks at each fact with one call into C, and
touches few objects of the stream's own: with a hundred streams at work each of them has left the processor's
cache when its turn comes (`make bench`: the slope).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_gateway.telemetry import Gaps
from vllm_gateway.upstream.client import Connection
from vllm_gateway.upstream.sse import Events, last_event
from vllm_gateway.upstream.template import Template, Templates
from vllm_gateway.web.channel import Channel
from vllm_gateway.web.dialect import Account, Shape, Shortcut, StreamDialect

_LESSONS = 8
_LONGEST = 2048
_NONE = Shortcut()


def _size_line(read: int) -> bytes:
    """How a chunk begins that is a read of its own; of one with a single digit there is no token event."""
    digits = 2 if read <= 4 + 0xFF + 2 else 3
    return b"%x\r\n" % max(0, read - digits - 4)


# By the read's length: streams have few lengths, and share these.
_SIZE_LINES = tuple((line, len(line)) for line in map(_size_line, range(_LONGEST)))


class Tokens(asyncio.Protocol):
    """One stream's. `last` is the loop's time of the last token, or of what counts as progress.

    Once a token event has come that is like those to be expected, the engine's connection is diverted here.
    """

    __slots__ = (
        "_account",
        "_add_gap",
        "_channel",
        "_connection",
        "_direct",
        "_diverted",
        "_events",
        "_gaps",
        "_lessons",
        "_now",
        "_passed",
        "_prefix",
        "_quick",
        "_shape",
        "_shortcut",
        "_skip",
        "_suffix",
        "_template",
        "_templates",
        "last",
    )

    def __init__(
        self,
        channel: Channel,
        connection: Connection,
        events: Events,
        dialect: StreamDialect,
        gaps: Gaps,
        templates: Templates,
        now: Callable[[], float],
        last: float,
    ) -> None:
        self._direct: Callable[[bytes], None] | None = None  # while the next read may go the short way
        self._now = now
        self.last = last
        self._gaps = gaps
        self._add_gap = gaps.add
        self._passed = 0  # events that the account does not know yet
        self._channel = channel
        self._connection = connection
        self._diverted = False
        self._events = events
        self._account: Account = dialect.account
        self._shortcut = dialect if isinstance(dialect, Shortcut) else _NONE
        self._lessons = 0 if self._shortcut is _NONE else _LESSONS
        self._templates = templates
        self._template: Template | None = None

    # With the template come what is looked for in a read of one chunk, and what is made of its text.
    _prefix: bytes
    _skip: int
    _suffix: bytes
    _shape: Shape | None
    _quick: bool

    # asyncio.Protocol, of the engine's connection

    def data_received(self, data: bytes) -> None:
        """One chunk with one ordinary token event goes from one connection to the other; the rest goes on."""
        direct, size = self._direct, len(data)
        if direct is None or size >= _LONGEST:
            self._pass_on(data)
            return
        line, start = _SIZE_LINES[size]
        suffix = self._suffix
        start += self._skip
        tail = size - len(suffix)
        # The first quote after the text's begin is the one that ends it: nothing but a text is in between.
        if not (data.startswith(line) and data.endswith(suffix) and data.find(b'"', start) == tail):
            self._pass_on(data)
            return
        shape = self._shape
        if shape is None:
            direct(data)
        else:
            text = data[start:tail]
            if not (data.startswith(self._prefix, start - self._skip) and shape.fits(text)):
                self._pass_on(data)
                return
            direct(b"%x\r\n%b%b%b\r\n" % (shape.around + len(text), shape.head, text, shape.foot))
        now = self._now()
        self._add_gap(now - self.last)
        self._passed += 1
        self.last = now

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        self._connection.connection_lost(exc)

    def _pass_on(self, data: bytes) -> None:
        self._direct = None
        self._settle()
        self._connection.data_received(data)

    # upstream.client.Tap

    def take(self, data: bytes) -> int:
        """Ordinary token events at the beginning of a read, any number of them: how many bytes they are."""
        template = self._template
        if template is None or not self._events.between or self._shortcut.holds:
            return 0
        taken, texts = template.scan(data)
        if not texts:
            return 0
        if self._shortcut.verbatim:
            self._channel.forward(data if taken == len(data) else data[:taken])
        elif sent := self._shortcut.rewrite(template.key, texts):
            self._channel.write(sent)
        self.count(len(texts))
        if taken == len(data) and self._quick:
            self._divert()
        return taken

    def _divert(self) -> None:
        self._direct = self._channel.direct()  # not before: at the first, the caller's head may still wait
        if self._direct is not None and not self._diverted:
            self._diverted = True
            self._connection.divert(self)

    # Accounts

    def first(self, block: bytes) -> None:
        """The first token has come: there is no gap before it."""
        self.last = self._now()
        self._account.token_events += block.count(b"\n\n")
        self._learn(block)

    def more(self, block: bytes) -> None:
        """Further tokens that came the long way."""
        self.count(block.count(b"\n\n"))
        self._learn(block)

    def count(self, events: int) -> None:
        now = self._now()
        self._gaps.after(now - self.last, events)
        self._account.token_events += events
        self.last = now

    def close(self) -> None:
        """Nothing is passed on any more."""
        if self._passed:
            self._settle()
        self._template = self._direct = None
        self._lessons = 0

    def _settle(self) -> None:
        self._account.token_events += self._passed
        self._passed = 0

    def _learn(self, block: bytes) -> None:
        """Looks how the engine's token events are made, a few times: not all streams have a template."""
        shortcut = self._shortcut
        if not self._lessons or self._account.done or (shortcut.verbatim and not self._channel.forwards):
            return
        self._lessons -= 1
        template = self._templates.learn(last_event(block))
        if template is None:
            return
        self._template = template
        self._prefix, self._suffix = template.prefix, template.suffix + b"\r\n"
        self._skip = len(template.prefix)
        self._shape = shortcut.shape(template.key)
        # Verbatim, the prefix is not compared: so what follows the text must say that it is no end.
        told = template.suffix.find(b'"finish_reason":null') >= 0
        self._quick = self._shape is not None or (shortcut.verbatim and told)
