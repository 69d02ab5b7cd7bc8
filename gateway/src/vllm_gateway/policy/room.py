"""How much of requests and whole answers is in memory at once, all of them together.

Each body has its limit, but a thousand of them that wait for an engine would end a process of 512 MiB, and
with it every stream that it carries. So there is room for so many bytes, and who finds none is asked to come
back: a refused request can be sent again, a broken stream cannot.
"""

from __future__ import annotations

from vllm_gateway.errors import GatewayError

_SMALL = 16 * 1024


class Room:
    """`left` is in bytes, and `most` where nobody holds any."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def taken(self) -> int:
        return self.most - self.left


class Held:
    """What one request holds of the room: its body, then its answer. What is small is not counted: the
    number of requests bounds that.
    """

    __slots__ = ("_counted", "_room", "_size")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = self._counted = 0

    def add(self, size: int) -> None:
        """So many bytes more have come. Raises a 503 where there is no room for them."""
        self._size += size
        if self._size <= _SMALL:
            return
        more = self._size - self._counted
        if more > self._room.left:
            raise no_room()
        self._room.left -= more
        self._counted = self._size

    def let_go(self) -> None:
        """The bytes are needed no longer; safe to call twice."""
        self._room.left += self._counted
        self._size = self._counted = 0


def no_room() -> GatewayError:
    text = "This gateway holds as many large requests as it has memory for; try again."
    return GatewayError(503, "gateway_full", text, retry_after=2)
