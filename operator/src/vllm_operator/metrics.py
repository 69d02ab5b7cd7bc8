"""The operator's metrics, as named in the catalogue (docs/reference/metrics). One registry, handed around."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vllm_operator.api.status import Reason

_REASONS = {reason.value for reason in Reason}


class FleetCollector:
    """Counts models and GPUs when it is scraped, from the statuses as they stand; so nothing can go stale."""

    def __init__(self, bodies: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self._bodies = bodies

    def collect(self) -> Iterator[Metric]:
        models = GaugeMetricFamily(
            "vllm_operator_models", "Models by readiness and reason.", labels=["ready", "reason"]
        )
        gpus = GaugeMetricFamily(
            "vllm_operator_gpus", "GPUs that models ask for, and of ready pods.", labels=["state"]
        )
        states = GaugeMetricFamily(
            "vllm_operator_model_ready",
            "1 for a model whose condition Ready is True, else 0, with the condition's reason.",
            labels=["model", "reason"],
        )
        tally: Tally[tuple[str, str]] = Tally()
        requested = ready = 0
        for body in self._bodies():
            status = body.get("status") or {}
            readiness, reason = _readiness(status)
            tally[readiness, reason] += 1
            states.add_metric([_name(body), reason], float(readiness == "true"))
            requested += status.get("gpus", 0)
            ready += _ready_gpus(body, status)
        for labels, count in sorted(tally.items()):
            models.add_metric(list(labels), count)
        gpus.add_metric(["requested"], requested)
        gpus.add_metric(["ready"], ready)
        yield models
        yield states
        yield gpus


def _name(body: dict[str, Any]) -> str:
    """As the gateway calls it in its own label `model`."""
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def _readiness(status: dict[str, Any]) -> tuple[str, str]:
    ready: dict[str, Any] = next(
        (item for item in status.get("conditions") or () if item["type"] == "Ready"), {}
    )
    reason = ready.get("reason", "")
    return ("true" if ready.get("status") == "True" else "false"), reason if reason in _REASONS else "Unknown"


def _ready_gpus(body: dict[str, Any], status: dict[str, Any]) -> int:
    """`status.gpus` is of all wanted replicas; more may be ready for a moment, while a rollout lasts."""
    wanted = max(int((body.get("spec") or {}).get("replicas") or 1), 1)
    return int(status.get("gpus", 0)) * min(int(status.get("readyReplicas", 0)), wanted) // wanted


class Metrics:
    """`models` gives all models' bodies at the time of a scrape."""

    def __init__(self, models: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(FleetCollector(models))
        self._reconciles = Counter(
            "vllm_operator_reconciles",
            "Reconciles by result (ok, refused, gone, error), and by the reason in the model's status or the "
            "kind of an API error.",
            ["result", "reason"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "vllm_operator_reconcile_duration_seconds",
            "Time of one reconcile.",
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self._to_ready = Histogram(
            "vllm_operator_time_to_ready_seconds",
            "From when a model was applied, or lost its readiness, to Ready.",
            registry=self.registry,
            buckets=(5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600),
        )
        self._api_errors = Counter(
            "vllm_operator_api_errors",
            "Failed requests to the API server, 0 for no answer.",
            ["code"],
            registry=self.registry,
        )
        self._leader = Gauge(
            "vllm_operator_leader", "1 while this replica holds the lease.", registry=self.registry
        )

    def reconciled(self, result: str, reason: str, seconds: float) -> None:
        self._reconciles.labels(result, reason).inc()
        self._duration.observe(seconds)

    def became_ready(self, seconds: float) -> None:
        self._to_ready.observe(seconds)

    def api_error(self, code: int) -> None:
        self._api_errors.labels(str(code)).inc()

    def text(self, *, leader: bool) -> bytes:
        self._leader.set(leader)
        return generate_latest(self.registry)
