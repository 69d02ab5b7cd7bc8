"""What a Prometheus registry exports, before anything was counted.

Source of docs/reference/metrics.md, and of the test that dashboards name nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry


@dataclass(frozen=True)
class Exported:
    """A metric by the name that queries use; `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        suffixes = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(self.name + suffix for suffix in suffixes)


def exported(registry: CollectorRegistry) -> list[Exported]:
    """Every metric of a registry, in the order of registration."""
    # prometheus-client (pinned) has no public way to a metric's labels while it has no samples.
    found = []
    for collector in registry._collector_to_names:  # noqa: SLF001
        own = getattr(collector, "_labelnames", None)
        for family in collector.collect() if own is None else collector.describe():  # type: ignore[attr-defined]
            labels = tuple(getattr(family, "_labelnames", ()) if own is None else own)
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found.append(Exported(name, family.type, labels, family.documentation))
    return found
