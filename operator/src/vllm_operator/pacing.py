"""When a status is written: at once where it says something new, and else with what is said a moment later.

A pod that comes up changes the words several times a second (made, on its node, pulling, loading), and every
write costs the API server as much as a child. So what is only said differently waits for HOLD_SECONDS from
its first change, and is then written as it is by then. Nothing is kept but the time: each reconcile observes
anew.
"""

from __future__ import annotations

from vllm_operator.api.status import Status
from vllm_operator.clock import Clock
from vllm_operator.events import PASSING
from vllm_operator.names import ModelKey

HOLD_SECONDS = 1.0


class Pacing:
    def __init__(self, clock: Clock, seconds: float = HOLD_SECONDS) -> None:
        self._clock, self._seconds = clock, seconds
        self._due: dict[ModelKey, float] = {}

    def hold(self, key: ModelKey, before: Status, after: Status) -> float:
        """Seconds for which the write may wait; 0 where it is due, or there is nothing to write."""
        if after == before or is_news(before, after):
            return 0.0
        now = self._clock.monotonic()
        return max(0.0, self._due.setdefault(key, now + self._seconds) - now)

    def forget(self, key: ModelKey) -> None:
        """Its status is as it should be, or it has none any more."""
        self._due.pop(key, None)


def is_news(before: Status, after: Status) -> bool:
    """Whether more changes than messages, numbers of pods, and which step a start has come to."""
    return _told(before) != _told(after)


def _told(status: Status) -> tuple[Status, frozenset[tuple[str, str, str, int]]]:
    conditions = frozenset(
        (item.type, item.status, "" if item.reason in PASSING else item.reason, item.observed_generation)
        for item in status.conditions
    )
    counts = {"replicas": 0, "ready_replicas": 0}
    return status.model_copy(update={"conditions": (), **counts}), conditions
