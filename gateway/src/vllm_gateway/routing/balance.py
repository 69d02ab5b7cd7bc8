"""Which endpoint a request goes to: of those that are well and not full, the one that the strategy says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_gateway.routing.health import Health
from vllm_gateway.routing.load import Load
from vllm_gateway.routing.pick import Hint, Strategy, by_weight
from vllm_gateway.routing.table import Endpoint, Model
from vllm_gateway.settings import Routing

# What an engine can be blamed for. Not here: 4xx, a full engine's 503, callers that leave or do not read.
ILL = frozenset(
    {
        "connect",
        "connect_timeout",
        "closed_early",
        "bad_response",
        "eof",
        "reset",
        "first_token_timeout",
        "idle_timeout",
        "unary_timeout",
        "in_band_error",
        "abort",
        "status_500",
        "status_502",
    }
)
WELL = "complete"


@dataclass(frozen=True, slots=True)
class Balancer:
    """Chooses endpoints, and hears how that went. `default` is for models that do not say."""

    load: Load
    health: Health
    strategies: Mapping[Routing, Strategy]
    default: Routing
    max_in_flight: int

    def model(self, models: Sequence[Model], hint: Hint) -> Model:
        """The model of those that share a name. Where none has an endpoint, the first that may get one."""
        ready = by_weight(models, hint)
        return ready or next((model for model in models if not model.stalled), models[0])

    def endpoint(self, model: Model, tried: Sequence[str], hint: Hint) -> Endpoint:
        """One of the model's endpoints (there is one). A condition that leaves none gives way."""
        if len(model.endpoints) == 1:
            return model.endpoints[0]
        endpoints: Sequence[Endpoint] = self.health.usable(model.endpoints)
        if tried:
            endpoints = (
                [end for end in endpoints if end.id not in tried] or untried(model, tried) or endpoints
            )
        most = model.limits.max_in_flight or self.max_in_flight
        counts = self.load.by_endpoint
        endpoints = [end for end in endpoints if counts.get(end.id, 0) < most] or endpoints
        return self.strategies[model.routing or self.default](endpoints, counts, hint)

    def report(self, endpoint: Endpoint, outcome: str | None) -> None:
        """How a request ended: WELL, a reason for failure, or None where it says nothing."""
        if outcome == WELL:
            self.health.succeeded(endpoint.id)
        elif outcome in ILL:
            self.health.failed(endpoint.id)
        else:
            self.health.ended(endpoint.id)

    def ejected(self, models: Mapping[str, Model]) -> Mapping[str, int]:
        """Endpoints that get nothing now, by model."""
        return {key: len(self.health.ejected(model.endpoints)) for key, model in models.items()}

    def follow(self, models: Mapping[str, Model]) -> None:
        """The table was swapped."""
        self.health.keep({endpoint.id for model in models.values() for endpoint in model.endpoints})


def untried(model: Model, tried: Sequence[str]) -> list[Endpoint]:
    return [endpoint for endpoint in model.endpoints if endpoint.id not in tried]
