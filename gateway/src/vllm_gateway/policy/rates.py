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
from collections.abc import Awaitable
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


class _Together:
    """One kind of limit, counted in the shared store, and by `alone` while that is away."""

    def __init__(self, unit: str, alone: Alone, limiter: RateLimiter, shared: Shared) -> None:
        self._unit = unit
        self._alone = alone
        self._limiter = limiter
        self._shared = shared
        self._items: dict[int, RateLimitItem] = {}

    async def hit(self, name: str, most: int, cost: int = 1) -> bool:
        async def alone() -> bool:
            return self._alone.hit(name, most, cost)

        return await self._shared.attempt(lambda: self._limiter.hit(self._item(most), name, cost=cost), alone)

    async def test(self, name: str, most: int) -> bool:
        async def alone() -> bool:
            return self._alone.test(name, most)

        return await self._shared.attempt(lambda: self._limiter.test(self._item(most), name), alone)

    async def seconds_left(self, name: str, most: int) -> float:
        """Until something is free again."""

        async def ask() -> float:
            return (await self._limiter.get_window_stats(self._item(most), name)).reset_time - time.time()

        async def alone() -> float:
            return self._alone.seconds_left(name)

        return await self._shared.attempt(ask, alone)

    def _item(self, most: int) -> RateLimitItem:
        item = self._items.get(most)
        if item is None:
            if len(self._items) >= _ITEMS:  # so many limits have been in the file of keys, one after another
                self._items.clear()
            item = self._items[most] = RateLimitItemPerMinute(most, namespace=self._unit)
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
        self._requests, self._tokens = SlidingMinute(clock), FixedMinute(clock)
        self._together: tuple[_Together, _Together] | None = None  # requests and tokens
        if shared.pool is not None:
            storage = shared_storage(shared.pool)
            self._together = (
                _Together("requests", self._requests, SlidingWindowCounterRateLimiter(storage), shared),
                _Together("tokens", self._tokens, FixedWindowRateLimiter(storage), shared),
            )
        self._active: dict[str, int] = {}
        self._charges: set[asyncio.Task[bool]] = set()

    def permit(self, caller: Caller) -> Permit:
        """One of the key's requests at once, until it is given back. Raises a 429."""
        name, most = caller.name, caller.limits.concurrency
        if most is not None and self._active.get(name, 0) >= most:
            raise _exceeded(f"The key {name!r} has {most} requests under way, its limit.", 1)
        return Permit(self._active, name)

    def admit(self, caller: Caller) -> Awaitable[None] | None:
        """Counts a request: by itself where it counts alone, else once what it returns is awaited. Raises a
        429. Tokens come first, so that what they refuse costs no request.
        """
        limits, name = caller.limits, caller.name
        tokens, requests = limits.tokens_per_minute, limits.requests_per_minute
        if self._together is not None:
            return _admit(*self._together, name, requests, tokens)
        if tokens is not None and not self._tokens.test(name, tokens):
            raise _used_up("tokens", name, tokens, self._tokens.seconds_left(name))
        if requests is not None and not self._requests.hit(name, requests):
            raise _used_up("requests", name, requests, self._requests.seconds_left(name))
        return None

    def charge(self, caller: Caller, tokens: int) -> None:
        """Counts what an answer cost. Not awaited: its caller may have been cancelled, and need not wait."""
        most = caller.limits.tokens_per_minute
        if most is None or tokens <= 0:
            return
        if self._together is None:
            self._tokens.hit(caller.name, most, tokens)
            return
        charge = asyncio.ensure_future(self._together[1].hit(caller.name, most, tokens))
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


async def _admit(
    of_requests: _Together, of_tokens: _Together, name: str, requests: int | None, tokens: int | None
) -> None:
    if tokens is not None and not await of_tokens.test(name, tokens):
        raise _used_up("tokens", name, tokens, await of_tokens.seconds_left(name, tokens))
    if requests is not None and not await of_requests.hit(name, requests):
        raise _used_up("requests", name, requests, await of_requests.seconds_left(name, requests))


def _used_up(unit: str, name: str, most: int, left: float) -> GatewayError:
    # The whole second after it, for at the very moment a sliding window is still full; at least one, and
    # never more than the window.
    seconds = max(1, min(math.floor(left) + 1, int(MINUTE)))
    return _exceeded(f"The key {name!r} has used its {most} {unit} a minute.", seconds)


def _exceeded(text: str, seconds: int) -> GatewayError:
    return GatewayError(429, "rate_limit_exceeded", f"{text} Try again in {seconds} s.", retry_after=seconds)
