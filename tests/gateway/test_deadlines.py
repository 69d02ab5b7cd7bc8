"""One time limit for many, on one timer.

Proves: each is late at its own time and once; who ends in time is not; one timer runs for all and none for
nobody; who is late may begin again, or end others, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from virtual_loop import VirtualLoop

from vllm_gateway.deadlines import Deadlines

SECONDS = 10.0


class Somebody:
    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.late = 0
        self._then = then

    def too_late(self) -> None:
        self.late += 1
        self._then()


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


@pytest.fixture
def deadlines(loop: VirtualLoop) -> Deadlines:
    return Deadlines(loop, SECONDS)


def test_each_is_late_at_its_own_time_and_once(loop: VirtualLoop, deadlines: Deadlines) -> None:
    first, second = Somebody(), Somebody()
    deadlines.begin(first)
    loop.advance(4)
    deadlines.begin(second)
    loop.advance(5.9)
    assert (first.late, second.late) == (0, 0)
    loop.advance(0.2)
    assert (first.late, second.late) == (1, 0)
    loop.advance(3.8)
    assert (first.late, second.late) == (1, 0)
    loop.advance(100)
    assert (first.late, second.late) == (1, 1)


def test_who_ends_in_time_is_not_late_and_may_begin_again(loop: VirtualLoop, deadlines: Deadlines) -> None:
    one, other = Somebody(), Somebody()
    deadlines.begin(one)
    deadlines.begin(other)
    loop.advance(9)
    deadlines.end(one)
    deadlines.end(one)
    deadlines.begin(one)
    loop.advance(9)
    assert (one.late, other.late) == (0, 1)
    loop.advance(1.1)
    assert one.late == 1


def test_one_timer_runs_for_all_and_none_for_nobody(loop: VirtualLoop, deadlines: Deadlines) -> None:
    for _ in range(100):
        deadlines.begin(Somebody())
        loop.advance(0.01)
    assert len(loop._scheduled) == 1  # type: ignore[attr-defined]
    loop.advance(2 * SECONDS)
    assert not loop._scheduled  # type: ignore[attr-defined]
    late = Somebody()
    deadlines.begin(late)
    loop.advance(SECONDS)
    assert late.late == 1


def test_who_is_late_may_begin_again_and_end_others(loop: VirtualLoop, deadlines: Deadlines) -> None:
    other = Somebody()

    def then() -> None:
        deadlines.end(other)
        deadlines.begin(again)

    again = Somebody(then)
    deadlines.begin(again)
    deadlines.begin(other)
    loop.advance(SECONDS)
    assert (again.late, other.late) == (1, 0)
    loop.advance(SECONDS)
    assert (again.late, other.late) == (2, 0)
