"""The master key that engines' keys are derived from, as the gateway reads it.

Proves: no file, no key; a changed file is taken up; a file that is gone or empty keeps the key that was good
and says so; the key reaches the endpoints of the model's own slices and no `repr`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from vllm_gateway.discovery.engine_keys import MasterKey
from vllm_gateway.routing.table import Endpoint


def test_without_a_file_there_is_no_key() -> None:
    assert MasterKey(None).of("ns", "m", "uid") is None


def test_a_key_is_that_of_one_model(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a" * 64 + "\n")
    keys = MasterKey(str(file))
    given = {
        keys.of(*model) for model in (("ns", "m", "1"), ("ns", "m", "2"), ("n", "m", "1"), ("ns", "n", "1"))
    }
    assert len(given) == 4
    assert keys.of("ns", "m", "1") == keys.of("ns", "m", "1")


async def test_a_changed_file_is_taken_up_and_a_bad_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a" * 64)
    keys, news = MasterKey(str(file), poll=0.01), asyncio.Event()
    before = keys.of("ns", "m", "1")
    task = asyncio.create_task(keys.follow(news.set))
    file.unlink()
    async with asyncio.timeout(5):
        while "cannot be read" not in keys.problem:  # noqa: ASYNC110 - what the file's reader says is a state
            await asyncio.sleep(0.01)
    assert keys.of("ns", "m", "1") == before
    assert not news.is_set()
    file.write_text("")
    assert keys.refresh() is False
    assert "empty" in keys.problem
    file.write_text("b" * 64)
    async with asyncio.timeout(5):
        await news.wait()
    assert keys.of("ns", "m", "1") != before
    assert keys.problem == ""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_key_is_not_printed() -> None:
    assert "secret" not in repr(Endpoint("id", "10.0.0.1", 8000, key="secret"))
