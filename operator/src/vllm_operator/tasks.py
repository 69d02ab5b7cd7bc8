"""Ending tasks for certain."""

from __future__ import annotations

import asyncio

ASK_AGAIN_SECONDS = 1.0


async def stop(*tasks: asyncio.Future[None]) -> None:
    """Cancels tasks and waits until they have ended, whatever with.

    Asked again each second: a cancellation can get lost where it meets the end of what is awaited, as it does
    in asyncio.wait_for before Python 3.12 (https://github.com/python/cpython/issues/86296).
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=ASK_AGAIN_SECONDS)
