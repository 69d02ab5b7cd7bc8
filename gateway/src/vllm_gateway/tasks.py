"""Work that goes on beside the requests for as long as the process: started, kept going, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable

_LOG = logging.getLogger("vllm_gateway.tasks")
_AGAIN_SECONDS = 5.0


async def keep_going(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Until `work` returns. What it raises is said, and it begins anew: else a gateway that serves on would
    follow its models, its keys or its certificate no longer, and nobody would hear of it.
    """
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - whatever it is: nobody else would hear of it
            _LOG.exception(
                "background work failed", extra={"fields": {"work": name, "again_in": _AGAIN_SECONDS}}
            )
        else:
            return
        await asyncio.sleep(_AGAIN_SECONDS)


def start(name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """A task that keeps `work` going."""
    return asyncio.create_task(keep_going(name, work), name=name)


async def stop(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits for their ends."""
    stopping = list(tasks)
    for task in stopping:
        task.cancel()
    for task in stopping:
        with contextlib.suppress(asyncio.CancelledError):
            await task
