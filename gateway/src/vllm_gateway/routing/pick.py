"""Pure choices with one signature: which model of those that share a name, which endpoint of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cachetools import LRUCache

from vllm_gateway.routing.ring import Ring, rendezvous
from vllm_gateway.routing.table import Endpoint, Model
from vllm_gateway.settings import Routing

LOAD_FACTOR = 1.25
PREFIX_CHARACTERS = 100
_RINGS = 128


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class Hint:
    """What a strategy may know of a request.

    `draw` is a number in [0, 1) that breaks ties; `prefix` is the beginning of the prompt, `session` the
    value of the session header, `caller` the name of the key; each may be empty.
    """

    draw: float = 0.0
    prefix: str = ""
    session: str = ""
    caller: str = ""


class Strategy(Protocol):
    """Chooses one of `endpoints` (never empty); `in_flight` counts by endpoint id, absent is 0."""

    def __call__(
        self, endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint
    ) -> Endpoint: ...


def least_load(endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint) -> Endpoint:
    """The endpoint with the fewest requests; ties by the draw, so that gateways do not herd."""
    if len(endpoints) == 1:
        return endpoints[0]
    lowest = min(in_flight.get(endpoint.id, 0) for endpoint in endpoints)
    ties = [endpoint for endpoint in endpoints if in_flight.get(endpoint.id, 0) == lowest]
    return ties[int(hint.draw * len(ties))]


def session(endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint) -> Endpoint:
    """The same endpoint for the same session while it is there; the least loaded without a session."""
    if not hint.session:
        return least_load(endpoints, in_flight, hint)
    return max(endpoints, key=lambda endpoint: (rendezvous(hint.session, endpoint.id), endpoint.id))


class PrefixHash:
    """The same endpoint for prompts that begin alike, so that its prefix cache has them (CHWBL).

    Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016): an endpoint that would
    have more than `LOAD_FACTOR` times the mean is passed over for the next one on the ring. Its rings are
    kept, since endpoints change rarely; that is all it remembers.
    """

    def __init__(self) -> None:
        self._rings: LRUCache[tuple[str, ...], Ring] = LRUCache(_RINGS)

    def __call__(self, endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint) -> Endpoint:
        if not hint.prefix or len(endpoints) == 1:
            return least_load(endpoints, in_flight, hint)
        loads = [in_flight.get(endpoint.id, 0) for endpoint in endpoints]
        bound = math.ceil(LOAD_FACTOR * (sum(loads) + 1) / len(endpoints))
        order = self._ring(endpoints).walk(hint.prefix)
        # The bound is above the mean, so that one is always below it.
        return endpoints[next(index for index in order if loads[index] < bound)]

    def _ring(self, endpoints: Sequence[Endpoint]) -> Ring:
        members = tuple(endpoint.id for endpoint in endpoints)
        ring = self._rings.get(members)
        if ring is None:
            ring = self._rings[members] = Ring(members)
        return ring


def strategies() -> Mapping[Routing, Strategy]:
    """A strategy for each value of `spec.gateway.routing`."""
    return {"LeastLoad": least_load, "PrefixHash": PrefixHash(), "Session": session}


def by_weight(models: Sequence[Model], hint: Hint) -> Model | None:
    """One of the models that have an endpoint, in proportion to their weights; None if none has.

    Sticky by session, else by caller: a canary does not answer every second turn of one conversation.
    """
    if len(models) == 1:
        return models[0] if models[0].endpoints else None
    ready = [model for model in models if model.endpoints]
    if len(ready) < 2:
        return ready[0] if ready else None
    key = hint.session or hint.caller
    if key:
        return max(ready, key=lambda model: (rendezvous(key, model.key, model.weight), model.key))
    point = hint.draw * sum(model.weight for model in ready)
    for model in ready:
        point -= model.weight
        if point < 0:
            return model
    return ready[-1]
