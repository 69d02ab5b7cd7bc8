"""Pure choices with one signature: which model of those that share a name, which endpoint of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_gateway.routing.table import Endpoint, Model


@dataclass(frozen=True, slots=True)
class Hint:
    """What a strategy may know of a request. `draw` is a number in [0, 1) that breaks ties."""

    draw: float = 0.0


class Strategy(Protocol):
    """Chooses one of `endpoints` (never empty); `in_flight` counts by endpoint id, absent is 0."""

    def __call__(
        self, endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint
    ) -> Endpoint: ...


def least_load(endpoints: Sequence[Endpoint], in_flight: Mapping[str, int], hint: Hint) -> Endpoint:
    """The endpoint with the fewest requests; ties by the draw, so that gateways do not herd."""
    lowest = min(in_flight.get(endpoint.id, 0) for endpoint in endpoints)
    ties = [endpoint for endpoint in endpoints if in_flight.get(endpoint.id, 0) == lowest]
    return ties[int(hint.draw * len(ties))]


def by_weight(models: Sequence[Model], hint: Hint) -> Model | None:
    """One of the models that have an endpoint, in proportion to their weights; None if none has."""
    ready = [model for model in models if model.endpoints]
    if len(ready) < 2:
        return ready[0] if ready else None
    point = hint.draw * sum(model.weight for model in ready)
    for model in ready:
        point -= model.weight
        if point < 0:
            return model
    return ready[-1]
