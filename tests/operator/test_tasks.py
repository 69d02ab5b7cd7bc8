"""Tasks end when they are told to.

Proves: a task that loses one cancellation is asked again; how a task ends is not raised.
"""

from __future__ import annotations

import asyncio

import pytest

from vllm_operator import tasks


async def test_a_lost_cancellation_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ASK_AGAIN_SECONDS", 0.01)
    lost: list[str] = []

    async def deaf_once() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.append("once")
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf_once())
    await asyncio.sleep(0)
    await tasks.stop(task)
    assert task.cancelled()
    assert lost == ["once"]


async def test_how_a_task_ends_is_not_raised() -> None:
    async def fails() -> None:
        raise ValueError

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    await tasks.stop(task, task)
    assert isinstance(task.exception(), ValueError)
