"""Passive health: an endpoint that keeps failing gets no requests for a while, then one on trial.

The trial is decided by the first sign that the engine works, not by the end of its answer, which may take
minutes. A response head is no such sign for a stream: vLLM sends it before its engine has done anything.

What counts is what requests met: Kubernetes takes a pod away whose probes fail, but vLLM's `/health` is 200
while its engine hangs. Answers of 4xx, of 503 (a full engine is no ill one) and callers that leave say
nothing about an endpoint and are not reported here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from vllm_gateway.routing.table import Endpoint

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Ejection:
    """When an endpoint is ejected, and for how long: `base` seconds, doubled each time, at most `longest`.

    `max_share` of a model's endpoints, rounded down, are ejected at once: the last one never is, since a bad
    answer is better than none.
    """

    failures: int = 3
    base: float = 10.0
    longest: float = 300.0
    max_share: float = 0.5


@dataclass(slots=True)
class _State:
    """`until` is when the ejection ends (None: trusted), `trial` is when its trial began."""

    failures: int = 0
    times: int = 0
    since: float = 0.0
    until: float | None = None
    trial: float | None = None


class Health:
    """What is known of endpoints that failed; of the others nothing is kept."""

    def __init__(self, clock: Clock, ejection: Ejection | None = None) -> None:
        self._clock = clock
        self._ejection = ejection or Ejection()
        self._states: dict[str, _State] = {}

    def usable(self, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Those of a model's `endpoints` that may get a request now; all of them if none is ejected."""
        if not self._states:
            return endpoints
        ejected = self.ejected(endpoints)
        return [endpoint for endpoint in endpoints if endpoint.id not in ejected] if ejected else endpoints

    def ejected(self, endpoints: Sequence[Endpoint]) -> Collection[str]:
        """Ids of the endpoints that get nothing now; up to the maximum share, the first to be ejected."""
        now = self._clock()
        closed: list[tuple[float, str]] = []
        for endpoint in endpoints:
            state = self._states.get(endpoint.id)
            if state is not None and self._closed(state, now):
                closed.append((state.since, endpoint.id))
        most = min(int(len(endpoints) * self._ejection.max_share), len(endpoints) - 1)
        return frozenset(name for _, name in sorted(closed)[:most])

    def chosen(self, endpoint: str) -> None:
        """A request goes there: the trial, if the ejection is over. Until it is decided no other one goes."""
        state = self._states.get(endpoint)
        if state is not None and state.until is not None and state.until <= self._clock():
            state.trial = self._clock()

    def proved(self, endpoint: str) -> None:
        """The engine has begun to answer a request: others may go there again. Until one of them got a whole
        answer a single failure ejects it anew: an engine may break off whatever it begins.
        """
        state = self._states.get(endpoint)
        if state is not None and state.trial is not None:
            state.until = state.trial = None
            state.failures = self._ejection.failures - 1
            state.since = self._clock()

    def succeeded(self, endpoint: str) -> None:
        """A request got a whole answer."""
        state = self._states.get(endpoint)
        if state is None:
            return
        if state.until is None and self._clock() - state.since > self._ejection.longest:
            del self._states[endpoint]  # well for long enough: the next ejection is short again
            return
        if state.until is not None:
            state.since = self._clock()
        state.failures, state.until, state.trial = 0, None, None

    def failed(self, endpoint: str) -> None:
        """The endpoint failed a request, by its own doing."""
        state = self._states.setdefault(endpoint, _State(since=self._clock()))
        state.failures += 1
        if state.until is None and state.failures < self._ejection.failures:
            return
        if state.until is not None and self._clock() < state.until:
            return  # a request that was under way, or went there over the maximum share: known already
        doubled = self._ejection.base * 2.0 ** min(state.times, 30)
        state.times += 1
        state.trial = None
        state.since = self._clock()
        state.until = state.since + min(doubled, self._ejection.longest)

    def ended(self, endpoint: str) -> None:
        """A request ended and says nothing: another may be the trial."""
        state = self._states.get(endpoint)
        if state is not None:
            state.trial = None

    def keep(self, endpoints: Collection[str]) -> None:
        """Forgets every endpoint that is not one of `endpoints`."""
        for endpoint in self._states.keys() - endpoints:
            del self._states[endpoint]

    def _closed(self, state: _State, now: float) -> bool:
        if state.until is None:
            return False
        if now < state.until:
            return True
        # On trial. One that never reported is not waited for longer than an ejection would last.
        return state.trial is not None and now - state.trial < self._ejection.longest
