"""How much is in flight where. Counted by leases, so that a count always comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from vllm_gateway.routing.table import Endpoint, Model

Clock = Callable[[], float]


class Load:
    """In-flight requests by endpoint and by model, and when each model was last busy.

    Written by the request loop alone; the management thread reads copies (a dict copy is atomic in CPython).
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.by_endpoint: Counter[str] = Counter()
        self.by_model: Counter[str] = Counter()
        self.last_busy: dict[str, float] = {}

    def lease(self, model: Model, endpoint: Endpoint) -> Lease:
        """Counts one request from `with` to its end, however it ends."""
        return Lease(self, model.key, endpoint.id)

    def idle_seconds(self, key: str, never: float) -> float:
        """Seconds since the model last had a request; `never` if it has not had one."""
        if self.by_model[key]:
            return 0.0
        last = self.last_busy.get(key)
        return never if last is None else max(0.0, self._clock() - last)

    def take(self, model: str, endpoint: str) -> None:
        self.by_model[model] += 1
        self.by_endpoint[endpoint] += 1

    def give_back(self, model: str, endpoint: str) -> None:
        self.last_busy[model] = self._clock()
        for counts, key in ((self.by_model, model), (self.by_endpoint, endpoint)):
            counts[key] -= 1
            if counts[key] <= 0:
                del counts[key]

    def snapshot(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Copies of the counts by model and by endpoint, for another thread."""
        return dict(self.by_model), dict(self.by_endpoint)


class Lease:
    """One request's place in the counts."""

    __slots__ = ("_endpoint", "_load", "_model")

    def __init__(self, load: Load, model: str, endpoint: str) -> None:
        self._load = load
        self._model = model
        self._endpoint = endpoint

    def __enter__(self) -> Self:
        self._load.take(self._model, self._endpoint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._load.give_back(self._model, self._endpoint)
