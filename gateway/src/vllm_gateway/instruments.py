"""Counters and histograms that one thread writes and a scrape reads.

prometheus-client's take a lock and some ten calls an observation: a twentieth of what a request cost. Its
registry, its exposition and its families are used as they are; only the counting is here. An
`int` or `float` is replaced as a whole, so a reader in another thread sees the value before or after it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Distribution:
    """One series of a histogram. `counts` has a place for each bound, and one for what is above."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As the exposition has them: cumulative, by their upper bounds."""
        bounds = [*map(str, map(float, self.bounds)), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class Counter(Collector):
    """A counter with labels; without any, its one series is there from the start."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._series: dict[tuple[str, ...], Count] = {} if labels else {(): Count()}

    def labels(self, *values: str) -> Count:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = Count()
        return found

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in list(self._series.items()):
            family.add_metric(values, count.value)
        yield family


class Histogram(Collector):
    """A histogram with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._series: dict[tuple[str, ...], Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = Distribution(self._bounds)
        return found

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, observed in list(self._series.items()):
            family.add_metric(values, observed.buckets(), sum_value=observed.total)
        yield family
