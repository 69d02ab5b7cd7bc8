"""Admission to a model: so many requests at its endpoints, so many that wait in order, none for ever.

A `Queue` belongs to one model and one gateway process, and to the request loop: nothing here awaits, so a
permit is never lost between two steps. What a caller is told while it waits is the web layer's business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from vllm_gateway.errors import GatewayError, model_removed
from vllm_gateway.routing.table import Model, not_ready
from vllm_gateway.settings import QueueSettings


@dataclass(frozen=True, slots=True)
class Rules:
    """One model's queue: `capacity` permits, `longest` waiters, the timeouts in seconds (0: no wait).

    Nobody waits for the first endpoint of a stalled model, which only a person can mend. A model that is
    about to serve is waited for as long as for a place at one that serves.
    """

    capacity: int
    longest: int
    queue_timeout: float
    cold_start: float

    @classmethod
    def of(cls, model: Model, defaults: QueueSettings) -> Rules:
        own = model.limits
        queue_timeout = _first(own.queue_timeout, defaults.queue_timeout)
        rollout = max(defaults.cold_start_timeout, queue_timeout if model.starting else 0.0)
        per_endpoint = _first(own.max_in_flight, defaults.max_in_flight)
        return cls(
            capacity=per_endpoint * len(model.endpoints),
            longest=_first(own.max_queue, defaults.max_queue),
            queue_timeout=queue_timeout,
            cold_start=0.0 if model.stalled else _first(own.cold_start, rollout),
        )


class Ticket:
    """One request's place: first in the queue, then a permit. Leaving the `with` gives back what it has.

    `settled` is done when waiting is over: None with the permit, a GatewayError (429, 503) without.
    """

    __slots__ = ("_queue", "deadline", "entered_at", "granted", "name", "settled")

    def __init__(self, queue: Queue, name: str, entered_at: float, settled: asyncio.Future[None]) -> None:
        self._queue = queue
        self.name = name
        self.entered_at = entered_at
        self.deadline = entered_at
        self.granted = False
        self.settled = settled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.leave(self)


class Queue:
    """One model's permits and waiters, first in, first out."""

    def __init__(self, model: Model, rules: Rules) -> None:
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._rules = rules
        self._waiting: deque[Ticket] = deque()
        self._served_since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._at_once: asyncio.Future[None] = self._loop.create_future()  # of all that need not wait
        self._at_once.set_result(None)
        self.in_use = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.in_use and not self._waiting

    def oldest_seconds(self) -> float:
        """How long the first of the queue has waited. Read by other threads too."""
        waiting = list(self._waiting)
        return self._loop.time() - waiting[0].entered_at if waiting else 0.0

    def enter(self, name: str) -> Ticket:
        """A permit where one is free and nobody waits, else a place at the end. Raises GatewayError."""
        if not self._waiting and self.in_use < self._rules.capacity:
            ticket = Ticket(self, name, self._loop.time(), self._at_once)
            self._grant(ticket)
            return ticket
        ticket = Ticket(self, name, self._loop.time(), self._loop.create_future())
        self._set_deadline(ticket)
        if ticket.deadline <= ticket.entered_at:
            raise self._refusal(name)
        if len(self._waiting) >= self._rules.longest:
            raise self._no_room(name)
        self._waiting.append(ticket)
        self._arm()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives back a permit or a place; safe at any moment, also between a grant and its notice."""
        if ticket.granted:
            ticket.granted = False
            self.in_use -= 1
            if self._waiting:
                self._advance()
        elif not ticket.settled.done():
            self._waiting.remove(ticket)
            ticket.settled.cancel()
            self._advance()
        elif not ticket.settled.cancelled():
            ticket.settled.exception()  # seen, else asyncio would report it for a caller that left

    def change(self, model: Model, rules: Rules) -> None:
        """Endpoints came or went, or the model was edited: waiters get what that allows, or new deadlines."""
        if bool(model.endpoints) != bool(self._model.endpoints):
            self._served_since = self._loop.time()
        self._model, self._rules = model, rules
        for ticket in self._waiting:
            self._set_deadline(ticket)
        self._advance()
        self._expire()

    def refuse_all(self) -> None:
        """The model is gone: whoever waits is told."""
        self._rules = Rules(0, 0, 0.0, 0.0)
        while self._waiting:
            ticket = self._waiting.popleft()
            ticket.settled.set_exception(model_removed(ticket.name))
        self._disarm()

    def _grant(self, ticket: Ticket) -> None:
        self.in_use += 1
        ticket.granted = True

    def _advance(self) -> None:
        while self._waiting and self.in_use < self._rules.capacity:
            ticket = self._waiting.popleft()
            self._grant(ticket)
            ticket.settled.set_result(None)
        if not self._waiting:
            self._disarm()

    def _set_deadline(self, ticket: Ticket) -> None:
        """From when the ticket came, or from when what it waits for changed: a place, or a first endpoint."""
        seconds = self._rules.queue_timeout if self._model.endpoints else self._rules.cold_start
        ticket.deadline = (
            max(ticket.entered_at, self._served_since) + seconds if seconds else ticket.entered_at
        )

    def _arm(self) -> None:
        """One timer for the queue. Deadlines need not be in order, since those of a cold start are reset."""
        if self._timer is None and self._waiting:
            earliest = min(ticket.deadline for ticket in self._waiting)
            self._timer = self._loop.call_at(earliest, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._disarm()
        now = self._loop.time()
        for ticket in [ticket for ticket in self._waiting if ticket.deadline <= now]:
            self._waiting.remove(ticket)
            ticket.settled.set_exception(self._refusal(ticket.name))
        self._arm()

    def _no_room(self, name: str) -> GatewayError:
        if not self._model.endpoints:  # nobody is served: "busy" would send a person to look for load
            return not_ready(name, [self._model])
        return queue_full(name, self._rules.longest)

    def _refusal(self, name: str) -> GatewayError:
        if not self._model.endpoints:
            return not_ready(name, [self._model])
        return queue_timeout(name, self._rules.queue_timeout)


class Queues:
    """The queue of each model that has had requests. Follows the table."""

    def __init__(self, defaults: QueueSettings) -> None:
        self._defaults = defaults
        self._queues: dict[str, Queue] = {}

    def enter(self, model: Model, name: str) -> Ticket:
        """A place in the model's queue, until the ticket's exit. Raises GatewayError: 429 if it is full, 503
        where there is no endpoint to wait for, or no room to wait for one.

        `name` is what the caller calls the model.
        """
        queue = self._queues.get(model.key)
        if queue is None:
            queue = self._queues[model.key] = Queue(model, Rules.of(model, self._defaults))
        return queue.enter(name)

    def follow(self, models: Mapping[str, Model]) -> None:
        """The table was swapped. Runs on the request loop."""
        for key, queue in list(self._queues.items()):
            model = models.get(key)
            if model is None:
                queue.refuse_all()
                del self._queues[key]
            else:
                queue.change(model, Rules.of(model, self._defaults))

    def snapshot(self) -> Mapping[str, tuple[int, float]]:
        """Waiters and the oldest one's seconds by model, for another thread."""
        return {key: (queue.queued, queue.oldest_seconds()) for key, queue in list(self._queues.items())}

    def in_use(self) -> int:
        """Permits that are out."""
        return sum(queue.in_use for queue in self._queues.values())


def queue_full(model: str, longest: int) -> GatewayError:
    text = f"The model {model!r} is busy and {longest} requests wait already; try again."
    return GatewayError(429, "queue_full", text, retry_after=2)


def queue_timeout(model: str, seconds: float) -> GatewayError:
    text = f"The model {model!r} is busy: no place came free within {seconds:g} s; try again."
    return GatewayError(503, "queue_timeout", text, retry_after=5)


Value = TypeVar("Value", int, float)


def _first(own: Value | None, default: Value) -> Value:
    return default if own is None else own
