"""Permits and the queue in front of a model.

Proves:
- for any order of arrivals, ends, cancellations, waits and changes of the model: never more permits are out
  than the capacity allows, nobody waits while a permit is free, permits go out in the order of arrival, every
  waiter is settled by its deadline, and at the end all counts are zero and no timer is left;
- a full queue is a 429 and an overdue place a 503, both with Retry-After; while the model has no endpoint a
  full queue is a 503 with the model's own reason;
- while there is no endpoint a request waits for the cold start, or not at all where time mends nothing; the
  503 has the model's own reason;
- an endpoint that comes up serves those who wait, at once and in order;
- a permit that was granted to a caller who had just left goes to the next one;
- a model that is removed refuses those who wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import TypeAdapter
from virtual_loop import VirtualLoop

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.queue import Queue, Queues, Rules, Ticket
from vllm_gateway.routing.table import Endpoint, Limits, Model
from vllm_gateway.settings import QueueSettings

COLD, BUSY = 100.0, 10.0
FULL = "429 queue_full with retry-after"


def model(endpoints: int = 1, reason: str = "ScaledToZero", **limits: float | None) -> Model:
    fleet = tuple(Endpoint(f"pod-{number}", "10.0.0.1", 8000) for number in range(endpoints))
    shown = "" if endpoints else reason
    return Model("m", "m", "ns", endpoints=fleet, reason=shown, limits=Limits(**limits))  # type: ignore[arg-type]


def stalled() -> Model:
    return dataclasses.replace(model(0, "CrashLooping"), stalled=True)


def defaults(**values: object) -> QueueSettings:
    return TypeAdapter(QueueSettings).validate_python(
        {"maxInFlight": 2, "maxQueue": 3, "queueTimeout": "10s", "coldStartTimeout": "100s"} | values
    )


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    yield loop
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
    loop.close()
    asyncio.set_event_loop(None)


class Caller:
    """A request's task as the web layer writes it: enter, wait, work until told to end, leave."""

    def __init__(self, loop: VirtualLoop, queues: Queues, model: Model) -> None:
        self.state = "new"
        self.refusal = ""
        self.end = loop.create_future()
        self.task = loop.create_task(self._run(queues, model))
        loop.settle()

    async def _run(self, queues: Queues, model: Model) -> None:
        try:
            with queues.enter(model, "m") as ticket:
                self.state = "waiting"
                await asyncio.wait((ticket.settled,))
                ticket.settled.result()
                self.state = "working"
                await self.end
            self.state = "done"
        except GatewayError as error:
            self.refusal = error.message
            self.state = f"{error.status} {error.code}" + (" with retry-after" if error.retry_after else "")


def test_a_full_queue_and_an_overdue_place(loop: VirtualLoop) -> None:
    queues = Queues(defaults())
    callers = [Caller(loop, queues, model()) for _ in range(6)]
    assert [caller.state for caller in callers] == ["working"] * 2 + ["waiting"] * 3 + [
        "429 queue_full with retry-after"
    ]
    assert queues.snapshot() == {"ns/m": (3, 0.0)}
    loop.advance(9.9)
    assert callers[2].state == "waiting"
    loop.advance(0.2)
    assert {caller.state for caller in callers[2:5]} == {"503 queue_timeout with retry-after"}
    for caller in callers[:2]:
        caller.end.set_result(None)
    loop.settle()
    assert queues.in_use() == 0
    assert queues.snapshot() == {"ns/m": (0, 0.0)}
    queues.follow({})
    assert queues.snapshot() == {}


@pytest.mark.parametrize("longest", [0, 2])
def test_no_room_to_wait_for_a_model_that_starts_is_no_load(loop: VirtualLoop, longest: int) -> None:
    queues = Queues(defaults(maxQueue=longest))
    starting = dataclasses.replace(model(0, "Loading"), starting=True, message="62 % of the weights")
    waiting = [Caller(loop, queues, starting) for _ in range(longest)]
    refused = Caller(loop, queues, starting)
    assert refused.state == "503 model_not_ready with retry-after"
    assert "Loading: 62 % of the weights" in refused.refusal
    assert [caller.state for caller in waiting] == ["waiting"] * longest
    queues.follow({})
    loop.settle()


def test_waiters_are_served_in_order(loop: VirtualLoop) -> None:
    queues = Queues(defaults(maxInFlight=1))
    callers = [Caller(loop, queues, model()) for _ in range(4)]
    for number in range(4):
        expected = ["done"] * number + ["working"] + ["waiting"] * (3 - number)
        assert [caller.state for caller in callers] == expected
        callers[number].end.set_result(None)
        loop.settle()


def test_a_newcomer_does_not_overtake(loop: VirtualLoop) -> None:
    queues = Queues(defaults(maxInFlight=1))
    first, second = (Caller(loop, queues, model()) for _ in range(2))
    first.end.set_result(None)
    third = Caller(loop, queues, model())  # arrives in the very turn in which the permit comes free
    assert (second.state, third.state) == ("working", "waiting")
    for caller in (second, third):
        caller.end.set_result(None)
        loop.settle()


def test_no_endpoint_without_a_cold_start_is_refused_at_once(loop: VirtualLoop) -> None:
    queues = Queues(defaults(coldStartTimeout="0s"))
    caller = Caller(loop, queues, model(0, "Loading"))
    assert caller.state == "503 model_not_ready with retry-after"


def test_what_time_does_not_mend_is_refused_at_once(loop: VirtualLoop) -> None:
    caller = Caller(loop, Queues(defaults()), stalled())
    assert caller.state == "503 model_not_ready with retry-after"
    assert loop.now == 1000.0


def test_a_cold_start_serves_those_who_wait(loop: VirtualLoop) -> None:
    queues = Queues(defaults())
    callers = [Caller(loop, queues, model(0)) for _ in range(3)]
    loop.advance(99)
    queues.follow({"ns/m": model(1)})
    loop.settle()
    assert [caller.state for caller in callers] == ["working", "working", "waiting"]
    loop.advance(9)  # a place is now waited for as long as any other
    assert callers[2].state == "waiting"
    loop.advance(2)
    assert callers[2].state == "503 queue_timeout with retry-after"
    for caller in callers[:2]:
        caller.end.set_result(None)
    loop.settle()


def test_a_cold_start_that_takes_too_long(loop: VirtualLoop) -> None:
    queues = Queues(defaults())
    caller = Caller(loop, queues, model(0))
    loop.advance(101)
    assert caller.state == "503 model_not_ready with retry-after"


def test_a_model_that_breaks_for_good_refuses_those_who_wait(loop: VirtualLoop) -> None:
    queues = Queues(defaults())
    caller = Caller(loop, queues, model(0))
    queues.follow({"ns/m": stalled()})
    loop.settle()
    assert caller.state == "503 model_not_ready with retry-after"


def test_a_removed_model_refuses_those_who_wait(loop: VirtualLoop) -> None:
    queues = Queues(defaults(maxInFlight=1))
    working, waiting = (Caller(loop, queues, model()) for _ in range(2))
    queues.follow({})
    loop.settle()
    assert (working.state, waiting.state) == ("working", "404 model_not_found")
    working.end.set_result(None)
    loop.settle()
    assert working.state == "done"


def test_a_permit_for_somebody_who_left_goes_to_the_next(loop: VirtualLoop) -> None:
    queues = Queues(defaults(maxInFlight=1))
    first, second, third = (Caller(loop, queues, model()) for _ in range(3))
    first.end.set_result(None)
    loop.call_soon(second.task.cancel)  # after the grant, before the second caller runs
    loop.settle()
    assert second.task.cancelled()
    assert third.state == "working"
    third.end.set_result(None)
    loop.settle()
    assert queues.in_use() == 0


def test_a_models_own_limits_beat_the_settings() -> None:
    own = model(2, max_in_flight=5, max_queue=7, queue_timeout=3.0, cold_start=4.0)
    assert Rules.of(own, defaults()) == Rules(10, 7, 3.0, 4.0)
    assert Rules.of(model(2), defaults()) == Rules(4, 3, 10.0, 100.0)


class QueueMachine(RuleBasedStateMachine):
    """Every order of events on one queue. `order` is the order of arrival."""

    @initialize(capacity=st.integers(0, 3))
    def start(self, capacity: int) -> None:
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.capacity = capacity
        self.queue = self.loop.run_until_complete(self._make())
        self.tickets: list[Ticket] = []
        self.granted: list[int] = []
        self.arrivals: list[Ticket] = []

    async def _make(self) -> Queue:
        return Queue(model(self.capacity), self._rules())

    def _rules(self) -> Rules:
        return Rules(self.capacity, 4, BUSY, COLD)

    async def _enter(self) -> Ticket | None:
        with contextlib.suppress(GatewayError):
            return self.queue.enter("m")
        return None

    @rule()
    def arrive(self) -> None:
        ticket = self.loop.run_until_complete(self._enter())
        if ticket is None:
            assert self.queue.queued == 4
        else:
            self.tickets.append(ticket)
            self.arrivals.append(ticket)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.tickets:
            ticket = data.draw(st.sampled_from(self.tickets))
            self.tickets.remove(ticket)
            self.queue.leave(ticket)
            self.queue.leave(ticket)  # twice is as once

    @rule(capacity=st.integers(0, 3))
    def change(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue.change(model(capacity), self._rules())

    @rule(seconds=st.sampled_from([0.1, 5.0, BUSY, COLD]))
    def wait(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @invariant()
    def holds(self) -> None:
        out = [ticket for ticket in self.tickets if ticket.granted]
        waiting = [ticket for ticket in self.tickets if not ticket.settled.done()]
        assert self.queue.in_use == len(out)
        assert self.queue.queued == len(waiting)
        if waiting:
            assert self.queue.in_use >= self.capacity, "somebody waits while a permit is free"
            assert min(ticket.deadline for ticket in waiting) > self.loop.time(), "overdue"
        self._grants_are_in_order(waiting)

    def _grants_are_in_order(self, waiting: list[Ticket]) -> None:
        """Nobody who waits came before somebody who was served."""
        for ticket in self.arrivals:
            served = (
                ticket.settled.done() and not ticket.settled.cancelled() and not ticket.settled.exception()
            )
            if served and waiting:
                assert self.arrivals.index(ticket) < self.arrivals.index(waiting[0])

    def teardown(self) -> None:
        for ticket in self.tickets:
            self.queue.leave(ticket)
        assert self.queue.idle
        self.loop.settle()
        assert self.loop._next_timer() is None
        self.loop.close()
        asyncio.set_event_loop(None)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
