"""Waiting longer after each failure, for ever, but never longer than a cap."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """`first` seconds, doubled with each failure up to `cap`; spread by a fifth, so that many do not meet.

    Iterating never ends, which is what kopf's `error_backoffs` needs to outlive an absent API server.
    """

    first: float = 0.5
    cap: float = 60.0

    def after(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row (at least 1)."""
        return min(self.cap, self.first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.8, 1.0)  # noqa: S311

    def __iter__(self) -> Iterator[float]:
        failures = 0
        while True:
            failures += 1
            yield self.after(failures)


@dataclass
class Restarts:
    """The waits before what should run for ever is started again."""

    backoff: Backoff
    failures: int = 0

    def pause(self, lasted: float) -> float:
        """Seconds to wait where it ran for `lasted`: longer than the cap, and it counts as the first failure.
        Else some failures in the course of months would make each one after them slow.
        """
        self.failures = 1 if lasted > self.backoff.cap else self.failures + 1
        return self.backoff.after(self.failures)
