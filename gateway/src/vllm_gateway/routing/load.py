"""How much is in flight where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_gateway.routing.table import Model

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Known:
    """A model of the table: `since` when, and which of those that had its name one after another."""

    created: int
    since: float


class Load:
    """In-flight requests by endpoint and by model, and since when each model of the table has been idle.

    Written by the request loop alone; the management thread reads copies (a dict copy is atomic in CPython).
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.by_endpoint: dict[str, int] = {}
        self.by_model: dict[str, int] = {}
        self._last_busy: dict[str, float] = {}
        self._known: Mapping[str, _Known] = {}

    def idle_seconds(self, key: str) -> float:
        """Seconds since the model last had a request; if it has not had one, since it has been in the table:
        a model that was made a minute ago has not been idle for longer, however old this process is.
        """
        known = self._known.get(key)
        if key in self.by_model or known is None:
            return 0.0
        return max(0.0, self._clock() - self._last_busy.get(key, known.since))

    def follow(self, models: Mapping[str, Model]) -> None:
        """The table was swapped. A model that was deleted and made again is a new one."""
        now, before = self._clock(), self._known
        known: dict[str, _Known] = {}
        for key, model in models.items():
            former = before.get(key)
            known[key] = former if former and former.created == model.created else _Known(model.created, now)
        same = {key for key, this in known.items() if this is before.get(key)}
        self._known = known
        self._last_busy = {key: at for key, at in self._last_busy.items() if key in same}

    def take(self, model: str, endpoint: str) -> None:
        """Counts one request, until `give_back`."""
        self.by_model[model] = self.by_model.get(model, 0) + 1
        self.by_endpoint[endpoint] = self.by_endpoint.get(endpoint, 0) + 1

    def give_back(self, model: str, endpoint: str) -> None:
        self._last_busy[model] = self._clock()
        for counts, key in ((self.by_model, model), (self.by_endpoint, endpoint)):
            if counts[key] > 1:
                counts[key] -= 1
            else:
                del counts[key]

    def snapshot(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Copies of the counts by model and by endpoint, for another thread."""
        return dict(self.by_model), dict(self.by_endpoint)
