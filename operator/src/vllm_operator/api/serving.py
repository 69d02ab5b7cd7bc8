"""How a model is rolled out, scaled and routed to: `spec.rollout`, `spec.autoscaling`, `spec.gateway`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vllm_operator.api.values import Duration, Rule, Section, duration_rule

Replicas = Annotated[int, Field(ge=0, le=1000)]


class Rollout(Section):
    """How a change of the pods is brought out."""

    strategy: Literal["Auto", "Surge", "InPlace", "Recreate"] = Field(
        "Auto",
        description="Surge starts new pods first, InPlace stops an old one first, Recreate stops all first. "
        "Auto: Surge where a node has the GPUs, CPU and memory to spare, else InPlace.",
    )
    rollback: Literal["Auto", "Never"] = Field(
        "Auto",
        description="Auto: where the previous pods had to go first and the new ones fail, within "
        "startTimeout or for good, what last served comes back until the next edit. Never: it stays down.",
    )
    drain_timeout: Duration | None = Field(
        None, description="How long running streams may go on in a pod that is to end. Default: 10m."
    )

    rules = (duration_rule("drainTimeout", "0s", "24h"),)


class Autoscaling(Section):
    """Replicas by load. Not in force yet: the model is held at minReplicas, and at least 1."""

    min_replicas: Replicas = Field(1, description="Fewest replicas.")
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = Field(description="Most replicas.")
    target_in_flight: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="Requests in flight per replica that is aimed at."
    )
    scale_down_after: Duration | None = Field(None, description="How long the load must be low.")
    cold_start_timeout: Duration | None = Field(
        None, description="How long a request waits for a first replica. Default: 10m."
    )

    rules = (
        Rule(
            "!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",
            "must be at most maxReplicas",
            lambda item: item.min_replicas <= item.max_replicas,
            ".minReplicas",
        ),
        duration_rule("scaleDownAfter", "1s", "24h"),
        duration_rule("coldStartTimeout", "1s", "24h"),
    )


class ResponseCache(Section):
    """Answers of deterministic requests, kept by the gateway."""

    ttl: Duration = Field(description="How long an answer is kept.")

    rules = (
        Rule(
            "duration(self.ttl) <= duration('24h')",
            "must be at most 24h",
            duration_rule("ttl", "0s", "24h").holds,
            ".ttl",
        ),
    )


class Gateway(Section):
    """How the gateway treats requests for this model. The operator only checks it."""

    routing: Literal["LeastLoad", "PrefixHash", "Session"] | None = Field(
        None, description="How an endpoint is chosen. Default: the gateway's routing.strategy, LeastLoad."
    )
    weight: Annotated[int, Field(ge=0, le=10_000)] = Field(
        100, description="Share of a short name that several models of one namespace hold."
    )
    first_token_timeout: Duration | None = Field(
        None, description="Longest wait for the first token. Default: the gateway's timeouts.firstToken."
    )
    idle_timeout: Duration | None = Field(
        None, description="Longest silence between two tokens. Default: the gateway's timeouts.idle."
    )
    max_in_flight: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Most requests in flight per endpoint and gateway pod. "
        "Default: the gateway's queue.maxInFlight.",
    )
    max_queue: Annotated[int, Field(ge=0, le=100_000)] | None = Field(
        None, description="Most requests that wait in a gateway pod. Default: the gateway's queue.maxQueue."
    )
    queue_timeout: Duration | None = Field(
        None, description="Longest wait in the queue. Default: the gateway's queue.queueTimeout."
    )
    response_cache: ResponseCache | None = Field(None, description="Keep answers of deterministic requests.")

    rules = (
        duration_rule("firstTokenTimeout", "1s", "24h"),
        duration_rule("idleTimeout", "1s", "24h"),
        duration_rule("queueTimeout", "0s", "24h"),
    )
