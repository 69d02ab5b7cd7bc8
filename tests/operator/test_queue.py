"""The queue: which key is worked on when.

Proves: one worker per key; doubles fold; a key added during its work runs once more; other keys go on
meanwhile; the limit of concurrent work; growing, capped waits without end after failures, reset by a success,
of what should never end by a long life; Retry-After; later appointments, of which the earliest stands;
cancellation ends the work that runs; keys with precedence go first, also those that get it while they wait,
and the others keep their share of turns.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fake_clock import FakeClock, settle

from vllm_operator.backoff import Backoff, Restarts
from vllm_operator.errors import Unavailable
from vllm_operator.queue import SHARE, Line, Queue


class Steady(Backoff):
    """Without the spread, so that times can be told."""

    def after(self, failures: int) -> float:
        return min(self.cap, self.first * 2.0 ** (failures - 1))


class Worker:
    """Notes who works when; `gate` holds all work while it is clear."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.running: set[str] = set()
        self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.answers: Callable[[str], float | None] = lambda _key: None

    async def __call__(self, key: str) -> float | None:
        assert key not in self.running
        self.started.append(key)
        self.running.add(key)
        self.most = max(self.most, len(self.running))
        try:
            await self.gate.wait()
            return self.answers(key)
        finally:
            self.running.discard(key)


@asynccontextmanager
async def running(
    work: Callable[[str], Awaitable[float | None]], clock: FakeClock
) -> AsyncIterator[Queue[str]]:
    queue: Queue[str] = Queue(work, clock, concurrency=2, backoff=Steady(first=1, cap=8))
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_doubles_fold_and_order_is_kept(clock: FakeClock) -> None:
    worker = Worker()
    async with running(worker, clock) as queue:
        for key in "abab":
            queue.add(key)
        assert len(queue) == 2
        await settle()
    assert worker.started == ["a", "b"]


async def test_a_key_added_during_its_work_runs_once_more(clock: FakeClock) -> None:
    worker = Worker()
    async with running(worker, clock) as queue:
        worker.gate.clear()
        queue.add("a")
        await settle()
        queue.add("a")
        queue.add("a")
        await settle()
        assert worker.started == ["a"]
        worker.gate.set()
        await settle()
    assert worker.started == ["a", "a"]


async def test_others_go_on_up_to_the_limit(clock: FakeClock) -> None:
    worker = Worker()
    async with running(worker, clock) as queue:
        worker.gate.clear()
        for key in "abc":
            queue.add(key)
        await settle()
        assert worker.started == ["a", "b"]
        worker.gate.set()
        await settle()
    assert worker.started == ["a", "b", "c"]
    assert worker.most == 2


async def test_failures_wait_longer_up_to_the_cap_and_never_end(clock: FakeClock) -> None:
    times: list[float] = []

    async def fail(_key: str) -> None:
        times.append(clock.time)
        raise ValueError("no")

    async with running(fail, clock) as queue:
        queue.add("a")
        await clock.advance(100)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[:5] == [1, 2, 4, 8, 8]
    assert set(waits[5:]) == {8}


async def test_a_success_starts_the_waits_anew(clock: FakeClock) -> None:
    outcomes = iter([ValueError(), ValueError(), None, ValueError(), None])
    times: list[float] = []

    async def work(_key: str) -> None:
        times.append(clock.time)
        if error := next(outcomes):
            raise error

    async with running(work, clock) as queue:
        queue.add("a")
        await clock.advance(10)
        queue.add("a")
        await clock.advance(10)
    assert [moment - 1000 for moment in times] == [0, 1, 3, 10, 11]


async def test_the_servers_retry_after_is_kept(clock: FakeClock) -> None:
    times: list[float] = []

    async def work(_key: str) -> None:
        times.append(clock.time)
        if len(times) == 1:
            raise Unavailable(429, "TooManyRequests", "slow down", retry_after=30)

    async with running(work, clock) as queue:
        queue.add("a")
        await clock.advance(60)
    assert [moment - 1000 for moment in times] == [0, 30]


async def test_work_can_ask_to_be_called_later(clock: FakeClock) -> None:
    worker = Worker()
    answers = iter([5.0, None])
    worker.answers = lambda _key: next(answers)
    async with running(worker, clock) as queue:
        queue.add("a")
        await clock.advance(4.9)
        assert worker.started == ["a"]
        await clock.advance(0.2)
        assert worker.started == ["a", "a"]
        await clock.advance(60)
    assert len(worker.started) == 2


async def test_the_earliest_appointment_stands(clock: FakeClock) -> None:
    worker = Worker()
    async with running(worker, clock) as queue:
        queue.add_after("a", 10)
        queue.add_after("a", 3)
        queue.add_after("a", 20)
        await clock.advance(2)
        assert worker.started == []
        await clock.advance(60)
    assert worker.started == ["a"]


async def test_cancelling_ends_the_work_that_runs(clock: FakeClock) -> None:
    worker = Worker()
    worker.gate.clear()
    async with running(worker, clock) as queue:
        queue.add("a")
        await settle()
        assert worker.running == {"a"}
    assert worker.running == set()


def test_precedence_goes_first_and_the_others_keep_their_share() -> None:
    line: Line[str] = Line(lambda key: key.startswith("new"))
    for number in range(3 * SHARE):
        line.add(f"old{number}")
        line.add(f"new{number}")
    assert (len(line), line.first) == (6 * SHARE, 3 * SHARE)
    turns = [line.take() for _ in range(len(line))]
    assert turns[: SHARE + 1] == [*(f"new{number}" for number in range(SHARE - 1)), "old0", f"new{SHARE - 1}"]
    assert [key for key in turns if key.startswith("old")] == [f"old{number}" for number in range(3 * SHARE)]
    last = turns.index(f"new{3 * SHARE - 1}")
    assert sum(key.startswith("old") for key in turns[:last]) == 3 * SHARE // (SHARE - 1)


def test_precedence_that_comes_later_counts_and_stays() -> None:
    urgent: set[str] = set()
    line: Line[str] = Line(urgent.__contains__)
    for key in "abc":
        line.add(key)
    urgent.add("c")
    line.add("c")
    urgent.clear()
    line.add("c")
    assert (len(line), line.first) == (3, 1)
    assert [line.take() for _ in range(3)] == ["c", "a", "b"]
    assert (len(line), line.first) == (0, 0)


async def test_work_is_done_in_order_of_precedence(clock: FakeClock) -> None:
    worker = Worker()
    queue: Queue[str] = Queue(worker, clock, concurrency=1, precedes=str.isupper)
    for key in "abCD":
        queue.add(key)
    assert queue.preceding == 2
    task = asyncio.create_task(queue.run())
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert worker.started == ["C", "D", "a", "b"]


def test_what_ran_for_long_begins_anew_with_short_waits() -> None:
    restarts = Restarts(Steady(first=1, cap=10))
    assert [restarts.pause(lasted) for lasted in (0, 5, 0, 0, 0, 60, 0)] == [1, 2, 4, 8, 10, 1, 2]
