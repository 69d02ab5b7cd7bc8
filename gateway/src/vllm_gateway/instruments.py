"""Counters and histograms that one thread writes and a scrape reads.

prometheus-client's take a lock and some ten calls an observation: a twentieth of what a request cost. Its
registry, its exposition and its families are used as they are; only the counting is here. An
`int` or `float` is replaced as a whole, so a reader in another thread sees the value before or after it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

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


Values = tuple[str, ...]
Series = TypeVar("Series")


class _Labelled(Generic[Series]):
    """Series by the values of their labels."""

    def __init__(self, labels: Sequence[str], series: dict[Values, Series]) -> None:
        self._labels, self._series = labels, series

    def values_of(self, label: str) -> set[str]:
        """Every value that a label has; none where there is no such label."""
        if label not in self._labels:
            return set()
        place = self._labels.index(label)
        return {values[place] for values in self._series}

    def forget(self, label: str, gone: Collection[str]) -> None:
        """Drops the series whose `label` has one of the values `gone`. For the thread that writes."""
        if label in self._labels:
            place = self._labels.index(label)
            for values in [values for values in self._series if values[place] in gone]:
                del self._series[values]


class Counter(_Labelled[Count], Collector):
    """A counter with labels; without any, its one series is there from the start."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        super().__init__(labels, {} if labels else {(): Count()})
        self._name, self._text = name, text

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


class Histogram(_Labelled[Distribution], Collector):
    """A histogram with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        super().__init__(labels, {})
        self._name, self._text, self._bounds = name, text, bounds

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


class Absences:
    """Since when names are missing: what comes back within `seconds` was never away."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[str, float] = {}

    def over(self, missing: Iterable[str], now: float) -> set[str]:
        """Of the names that are missing now, those that have been for so long."""
        self._since = {name: self._since.get(name, now) for name in missing}
        return {name for name, since in self._since.items() if now - since >= self._seconds}
