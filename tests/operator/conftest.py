"""Fixtures of the operator's tests, and the option of `pytest tests/operator --update-golden`."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from kube_api import KubeApi

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "operator"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files anew, to be reviewed"
    )


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[[Path, str], None]:
    """`golden(path, text)` compares with the committed file, or writes it with --update-golden."""
    update = pytestconfig.getoption("update_golden", default=False)

    def check(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: pytest tests/operator --update-golden"
        assert text == path.read_text(), (
            f"{path} differs: if this is meant, pytest tests/operator --update-golden"
        )

    return check


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with KubeApi(bookmark_seconds=0.05) as api:
        yield api


class FakeClock:
    """A clock that stands still until `advance`; sleepers wake in the order of their time."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.time)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.Event()
        self._sleepers.append((self.time + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        """Step by step, each sleeper at its own time, and everything that follows from it at once."""
        end = self.time + seconds
        await settle()
        while due := [item for item in self._sleepers if item[0] <= end]:
            moment, woken = min(due, key=lambda item: item[0])
            self._sleepers.remove((moment, woken))
            self.time = max(self.time, moment)
            woken.set()
            await settle()
        self.time = end
        await settle()


async def settle() -> None:
    """Lets everything run that can run without time passing."""
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
