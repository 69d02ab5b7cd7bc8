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
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter as LocalFixedWindow
from limits.strategies import RateLimiter as LocalRateLimiter
from limits.strategies import SlidingWindowCounterRateLimiter as LocalSlidingWindow
from limits.util import WindowStats

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keys import MAX_KEYS, Caller
from vllm_gateway.policy.shared import Shared

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

_PREFIX = "vllm-fleet"
_SWEEP_SECONDS = 5.0
_ITEMS = 1024


class _Memory(MemoryStorage):
    """limits 5.8 looks through all keys after every hit, in a thread; here that happens once in a while."""

    _next_sweep = 0.0

    def _MemoryStorage__schedule_expiry(self) -> None:  # noqa: N802 - a private name of the pinned library
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_SECONDS
            self._MemoryStorage__expire_events()  # type: ignore[attr-defined]


# Its errors need no translation, which limits wraps around each of these calls, twice for a subclass.
for _name in ("incr", "get"):
    setattr(_Memory, _name, getattr(MemoryStorage, _name).__wrapped__)


class _PerMinute(RateLimitItemPerMinute):
    """Keeps the keys that it has built: there is one for each API key."""

    __slots__ = ("_keys",)

    def __init__(self, amount: int, kind: str) -> None:
        super().__init__(amount, namespace=kind)
        self._keys: dict[str, str] = {}

    def key_for(self, *identifiers: bytes | str | float) -> str:
        name = str(identifiers[0])
        key = self._keys.get(name)
        if key is None:
            if len(self._keys) >= MAX_KEYS:  # so many names have been in the file, one after another
                self._keys.clear()
            key = self._keys[name] = super().key_for(*identifiers)
        return key


class _Window:
    """One kind of limit, counted in the shared store, or here while that is away.

    What is counted here takes no coroutine: limits' asynchronous memory store cost 80 µs a request.
    """

    def __init__(
        self, alone: type[LocalRateLimiter], kind: type[RateLimiter], storage: Storage | None, shared: Shared
    ) -> None:
        self._alone = alone(_Memory())
        self._together = kind(storage) if storage is not None else None
        self._shared = shared

    @property
    def shared(self) -> bool:
        """Whether counting may have to wait for a server."""
        return self._together is not None

    def hit_here(self, item: RateLimitItem, name: str, cost: int = 1) -> bool:
        return self._alone.hit(item, name, cost=cost)

    async def hit(self, item: RateLimitItem, name: str, cost: int = 1) -> bool:
        together = self._together
        if together is None:
            return self._alone.hit(item, name, cost=cost)

        async def alone() -> bool:
            return self._alone.hit(item, name, cost=cost)

        return await self._shared.attempt(lambda: together.hit(item, name, cost=cost), alone)

    async def test(self, item: RateLimitItem, name: str) -> bool:
        together = self._together
        if together is None:
            return self._alone.test(item, name)

        async def alone() -> bool:
            return self._alone.test(item, name)

        return await self._shared.attempt(lambda: together.test(item, name), alone)

    async def seconds_left(self, item: RateLimitItem, name: str) -> int:
        """Until something is free again: at least one, and never more than the window."""
        together = self._together
        if together is None:
            stats = self._alone.get_window_stats(item, name)
        else:

            async def alone() -> WindowStats:
                return self._alone.get_window_stats(item, name)

            stats = await self._shared.attempt(lambda: together.get_window_stats(item, name), alone)
        # The whole second after it: at the very moment a sliding window is still full.
        return max(1, min(math.floor(stats.reset_time - time.time()) + 1, item.get_expiry()))


class Permit:
    """One request of a key, counted while it runs."""

    __slots__ = ("_active", "_caller")

    def __init__(self, active: Counter[str], caller: Caller) -> None:
        self._active = active
        self._caller = caller

    def __enter__(self) -> None:
        name, most = self._caller.name, self._caller.limits.concurrency
        if most is not None and self._active[name] >= most:
            raise _exceeded(f"The key {name!r} has {most} requests under way, its limit.", 1)
        self._active[name] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        name = self._caller.name
        self._active[name] -= 1
        if not self._active[name]:
            del self._active[name]


class Rates:
    """The counts of all keys, shared with other gateways where a server is set."""

    def __init__(self, shared: Shared) -> None:
        storage = shared_storage(shared.pool) if shared.pool is not None else None
        self._requests = _Window(LocalSlidingWindow, SlidingWindowCounterRateLimiter, storage, shared)
        self._tokens = _Window(LocalFixedWindow, FixedWindowRateLimiter, storage, shared)
        self._items: dict[tuple[str, int], RateLimitItem] = {}
        self._active: Counter[str] = Counter()
        self._charges: set[asyncio.Task[bool]] = set()

    def permit(self, caller: Caller) -> Permit:
        """One of the key's requests at once, from `with`, which raises a 429, to its end."""
        return Permit(self._active, caller)

    async def admit(self, caller: Caller) -> None:
        """Counts a request. Raises a 429. Tokens come first, so that what they refuse costs no request."""
        limits, name = caller.limits, caller.name
        if limits.tokens_per_minute is not None:
            item = self._item("tokens", limits.tokens_per_minute)
            if not await self._tokens.test(item, name):
                raise _used_up(name, item, await self._tokens.seconds_left(item, name))
        if limits.requests_per_minute is not None:
            item = self._item("requests", limits.requests_per_minute)
            if not await self._requests.hit(item, name):
                raise _used_up(name, item, await self._requests.seconds_left(item, name))

    def charge(self, caller: Caller, tokens: int) -> None:
        """Counts what an answer cost. Not awaited: its caller may have been cancelled, and need not wait."""
        if caller.limits.tokens_per_minute is None or tokens <= 0:
            return
        item = self._item("tokens", caller.limits.tokens_per_minute)
        if not self._tokens.shared:
            self._tokens.hit_here(item, caller.name, tokens)
            return
        charge = asyncio.ensure_future(self._tokens.hit(item, caller.name, tokens))
        self._charges.add(charge)
        charge.add_done_callback(self._charges.discard)

    async def stop(self) -> None:
        """Waits for what is still to be counted."""
        await asyncio.gather(*self._charges, return_exceptions=True)

    @property
    def active(self) -> int:
        """Permits that are out."""
        return self._active.total()

    def _item(self, kind: str, amount: int) -> RateLimitItem:
        item = self._items.get((kind, amount))
        if item is None:
            if len(self._items) >= _ITEMS:  # so many limits have been in the file of keys, one after another
                self._items.clear()
            item = self._items[kind, amount] = _PerMinute(amount, kind)
        return item


def shared_storage(pool: ConnectionPool) -> Storage:
    options = {"connection_pool": pool}
    return RedisStorage(
        "async+redis://",
        wrap_exceptions=True,
        implementation="redispy",
        key_prefix=_PREFIX,
        **options,  # type: ignore[arg-type]
    )


def _used_up(name: str, item: RateLimitItem, seconds: int) -> GatewayError:
    text = f"The key {name!r} has used its {item.amount} {item.namespace} a minute."
    return _exceeded(text, seconds)


def _exceeded(text: str, seconds: int) -> GatewayError:
    return GatewayError(429, "rate_limit_exceeded", f"{text} Try again in {seconds} s.", retry_after=seconds)
