"""What one API key may use: requests and tokens a minute, and requests at once.

Requests are counted in a sliding window and refused before they run. What a request costs in tokens is known
after it: so a key that has used up its tokens is refused until the window ends, and the request that goes
over is let through whole. Requests at once are counted by each gateway process for itself: a count shared
through a server would leak with every gateway that dies.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Protocol

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keys import Caller
from vllm_gateway.policy.minutes import MINUTE, Clock, FixedMinute, SlidingMinute
from vllm_gateway.policy.shared import Shared

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

_PREFIX = "vllm-fleet"
_ITEMS = 1024


class Alone(Protocol):
    """One kind of limit, counted here. `most` is what a key may use in a minute."""

    def hit(self, name: str, most: int, cost: int = 1) -> bool: ...
    def test(self, name: str, most: int) -> bool: ...
    def seconds_left(self, name: str) -> float: ...


class _Window:
    """One kind of limit, counted in the shared store, or here while that is away."""

    def __init__(
        self, unit: str, alone: Alone, together: type[RateLimiter], storage: Storage | None, shared: Shared
    ) -> None:
        self.unit = unit
        self.alone = alone
        self._together = together(storage) if storage is not None else None
        self._shared = shared
        self._items: dict[int, RateLimitItem] = {}

    @property
    def shared(self) -> bool:
        """Whether counting may have to wait for a server."""
        return self._together is not None

    async def hit(self, name: str, most: int, cost: int = 1) -> bool:
        together = self._together
        if together is None:
            return self.alone.hit(name, most, cost)

        async def alone() -> bool:
            return self.alone.hit(name, most, cost)

        return await self._shared.attempt(lambda: together.hit(self._item(most), name, cost=cost), alone)

    async def test(self, name: str, most: int) -> bool:
        together = self._together
        if together is None:
            return self.alone.test(name, most)

        async def alone() -> bool:
            return self.alone.test(name, most)

        return await self._shared.attempt(lambda: together.test(self._item(most), name), alone)

    async def seconds_left(self, name: str, most: int) -> int:
        """Until something is free again: at least one, and never more than the window."""
        together = self._together
        if together is None:
            left = self.alone.seconds_left(name)
        else:
            left = await self._seconds_left_of_all(together, name, most)
        # The whole second after it: at the very moment a sliding window is still full.
        return max(1, min(math.floor(left) + 1, int(MINUTE)))

    async def _seconds_left_of_all(self, together: RateLimiter, name: str, most: int) -> float:
        async def ask() -> float:
            return (await together.get_window_stats(self._item(most), name)).reset_time - time.time()

        async def alone() -> float:
            return self.alone.seconds_left(name)

        return await self._shared.attempt(ask, alone)

    def _item(self, most: int) -> RateLimitItem:
        item = self._items.get(most)
        if item is None:
            if len(self._items) >= _ITEMS:  # so many limits have been in the file of keys, one after another
                self._items.clear()
            item = self._items[most] = RateLimitItemPerMinute(most, namespace=self.unit)
        return item


class Permit:
    """One request of a key, counted until it is given back."""

    __slots__ = ("_active", "_name")

    def __init__(self, active: dict[str, int], name: str) -> None:
        self._active, self._name = active, name
        active[name] = active.get(name, 0) + 1

    def give_back(self) -> None:
        if self._active[self._name] > 1:
            self._active[self._name] -= 1
        else:
            del self._active[self._name]


class Rates:
    """The counts of all keys, shared with other gateways where a server is set."""

    def __init__(self, shared: Shared, clock: Clock = time.monotonic) -> None:
        storage = shared_storage(shared.pool) if shared.pool is not None else None
        self._requests = _Window(
            "requests", SlidingMinute(clock), SlidingWindowCounterRateLimiter, storage, shared
        )
        self._tokens = _Window("tokens", FixedMinute(clock), FixedWindowRateLimiter, storage, shared)
        self._active: dict[str, int] = {}
        self._charges: set[asyncio.Task[bool]] = set()

    def permit(self, caller: Caller) -> Permit:
        """One of the key's requests at once, until it is given back. Raises a 429."""
        name, most = caller.name, caller.limits.concurrency
        if most is not None and self._active.get(name, 0) >= most:
            raise _exceeded(f"The key {name!r} has {most} requests under way, its limit.", 1)
        return Permit(self._active, name)

    async def admit(self, caller: Caller) -> None:
        """Counts a request. Raises a 429. Tokens come first, so that what they refuse costs no request."""
        limits, name = caller.limits, caller.name
        if (most := limits.tokens_per_minute) is not None and not await self._tokens.test(name, most):
            raise await _used_up(self._tokens, name, most)
        if (most := limits.requests_per_minute) is not None and not await self._requests.hit(name, most):
            raise await _used_up(self._requests, name, most)

    def charge(self, caller: Caller, tokens: int) -> None:
        """Counts what an answer cost. Not awaited: its caller may have been cancelled, and need not wait."""
        most = caller.limits.tokens_per_minute
        if most is None or tokens <= 0:
            return
        if not self._tokens.shared:
            self._tokens.alone.hit(caller.name, most, tokens)
            return
        charge = asyncio.ensure_future(self._tokens.hit(caller.name, most, tokens))
        self._charges.add(charge)
        charge.add_done_callback(self._charges.discard)

    async def stop(self) -> None:
        """Waits for what is still to be counted."""
        await asyncio.gather(*self._charges, return_exceptions=True)

    @property
    def active(self) -> int:
        """Permits that are out."""
        return sum(self._active.values())


def shared_storage(pool: ConnectionPool) -> Storage:
    options = {"connection_pool": pool}
    return RedisStorage(
        "async+redis://",
        wrap_exceptions=True,
        implementation="redispy",
        key_prefix=_PREFIX,
        **options,  # type: ignore[arg-type]
    )


async def _used_up(window: _Window, name: str, most: int) -> GatewayError:
    text = f"The key {name!r} has used its {most} {window.unit} a minute."
    return _exceeded(text, await window.seconds_left(name, most))


def _exceeded(text: str, seconds: int) -> GatewayError:
    return GatewayError(429, "rate_limit_exceeded", f"{text} Try again in {seconds} s.", retry_after=seconds)
