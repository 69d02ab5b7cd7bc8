"""Waiting for a place at a model: silent at first, so that a refusal still has a status of its own; then, for
a stream, with the head and a comment every few seconds, so that nothing in between takes it for dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_gateway.policy.queue import Ticket
from vllm_gateway.telemetry import Metrics
from vllm_gateway.web.channel import Channel
from vllm_gateway.web.exchange import Exchange

_COMMENT = b": waiting\n\n"


async def wait_for_place(
    ticket: Ticket, exchange: Exchange, begin: Callable[[], None] | None, seconds: float, metrics: Metrics
) -> None:
    """Until the ticket has its permit. Raises GatewayError where it gets none.

    `begin` sends a stream's head, after `seconds`; None for an answer that is no stream.
    """
    loop = asyncio.get_running_loop()
    try:
        await asyncio.wait((ticket.settled,), timeout=seconds if begin is not None else None)
        if begin is not None and not ticket.settled.done():
            begin()
            await _with_comments(exchange.channel, ticket.settled, seconds)
        ticket.settled.result()
    finally:
        metrics.queue_wait.labels(exchange.model).observe(loop.time() - ticket.entered_at)


async def _with_comments(channel: Channel, settled: asyncio.Future[None], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def beat() -> None:
        nonlocal timer
        channel.write(_COMMENT)
        timer = loop.call_later(seconds, beat)

    over: asyncio.Future[None] = loop.create_future()  # cancelled with the waiter, as the ticket's may not be
    settled.add_done_callback(lambda _: None if over.done() else over.set_result(None))
    beat()
    try:
        await channel.wait(over)
    finally:
        timer.cancel()
