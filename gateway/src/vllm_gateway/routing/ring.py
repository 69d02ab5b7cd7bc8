"""Hashing that every gateway replica does alike: rings of endpoints, and rendezvous scores.

Python's own `hash` differs from process to process; BLAKE2 does not.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import blake2b

POINTS = 256
_DIGEST = 64
_PER_DIGEST = _DIGEST // 8


def stable_hash(text: str) -> int:
    """64 bits of `text`."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def points_of(member: str) -> tuple[int, ...]:
    """Where a member stands on a ring: `POINTS` places, so that shares differ by some 6 % (1/√256)."""
    points: list[int] = []
    for number in range(POINTS // _PER_DIGEST):
        digest = blake2b(f"{member}/{number}".encode(), digest_size=_DIGEST).digest()
        points += (int.from_bytes(digest[at : at + 8], "big") for at in range(0, _DIGEST, 8))
    return tuple(points)


class Ring:
    """A consistent-hash ring: a member that comes or goes moves its own share of the keys and no other."""

    def __init__(self, members: Sequence[str]) -> None:
        self._members = members
        placed = sorted((point, index) for index, member in enumerate(members) for point in points_of(member))
        self._points = [point for point, _ in placed]
        self._owners = [index for _, index in placed]

    def walk(self, key: str) -> Iterator[int]:
        """Indices of the members in the order in which `key` prefers them, each once."""
        start = bisect_left(self._points, stable_hash(key))
        seen: set[int] = set()
        size = len(self._owners)
        for step in range(size):
            index = self._owners[(start + step) % size]
            if index not in seen:
                seen.add(index)
                yield index
                if len(seen) == len(self._members):
                    return


def rendezvous(key: str, member: str, weight: float = 1.0) -> float:
    """The member's score for `key`; the highest wins, in proportion to the weights.

    Highest random weight hashing (Thaler and Ravishankar, 1998), with weights as -w / ln(u): changing one
    weight moves keys to or from that member only.
    """
    if weight <= 0:
        return 0.0
    uniform = (stable_hash(f"{member}\0{key}") + 0.5) / 2**64
    return -weight / math.log(uniform)
