"""What several gateways share through Redis or Valkey, and what happens while it is away.

A gateway without its Redis goes on alone: limits are then counted per process and the cache is empty, which
is better than no answers. It is asked again every few seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from limits.errors import StorageError

from vllm_gateway.settings import RedisSettings

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

_LOG = logging.getLogger("vllm_gateway.shared")
_AWAY_SECONDS = 5.0
_CONNECTIONS = 32

Result = TypeVar("Result")


class _Credentials:
    """What each new connection shows, as redis-py asks for it: a password that was rotated is taken up."""

    def __init__(self, username: str | None, file: str | None) -> None:
        self._username, self._file = username, file

    def get_credentials(self) -> tuple[str, ...]:
        """Raises OSError where the file cannot be read."""
        password = Path(self._file).read_text().strip() if self._file else ""
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str, ...]:
        return self.get_credentials()


def connection_pool(settings: RedisSettings) -> BlockingConnectionPool:
    """Connections to the server of `settings.url`. Raises OSError where the password cannot be read."""
    # Only here: it takes 0.1 s to import, which a gateway without Redis does not need.
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    credentials = _Credentials(settings.username, settings.password_file)
    credentials.get_credentials()  # a file that is not there is told now
    return BlockingConnectionPool.from_url(
        (settings.url or "").replace("valkey", "redis", 1),
        credential_provider=credentials if settings.username or settings.password_file else None,
        max_connections=_CONNECTIONS,
        timeout=settings.timeout,
        socket_timeout=settings.timeout,
        socket_connect_timeout=settings.timeout,
        retry=Retry(NoBackoff(), 0),  # by default three, with up to ten seconds in between
    )


class Shared:
    """The server, if one is set: `pool` is None without. Remembers that it is away, so that not every request
    waits to find out; `away` is how it was when it was last asked.
    """

    def __init__(self, settings: RedisSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = connection_pool(settings) if settings.url is not None else None
        self._clock = clock
        self._until = 0.0
        self.failures = 0
        self.away = False

    async def close(self) -> None:
        if self.pool is not None:
            await self.pool.disconnect()

    async def attempt(
        self, shared: Callable[[], Awaitable[Result]], alone: Callable[[], Awaitable[Result]]
    ) -> Result:
        """What `shared` gives, or `alone` where the server is away."""
        if self._clock() < self._until:
            return await alone()
        try:
            result = await shared()
        except (StorageError, OSError, _redis_error()) as error:
            self._note(error)
            return await alone()
        self._until, self.away = 0.0, False
        return result

    def _note(self, error: Exception) -> None:
        self.failures += 1
        self.away = True
        known, self._until = self._clock() < self._until, self._clock() + _AWAY_SECONDS
        if known:
            return  # several requests were waiting for it
        fields = {"error": type(error).__name__, "detail": str(error)[:200]}
        _LOG.warning("redis is away: this gateway counts alone", extra={"fields": fields})


def _redis_error() -> type[Exception]:
    from redis.exceptions import RedisError

    return RedisError
