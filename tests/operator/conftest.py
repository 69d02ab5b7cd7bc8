"""Fixtures of the operator's tests, and the option of `pytest tests/operator --update-golden`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from fake_clock import FakeClock
from kube_api import KubeApi
from operator_rig import Rig, make_rig

from vllm_operator.settings import Settings

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


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def rig(api: KubeApi) -> AsyncIterator[Rig]:
    async with make_rig(api, Settings()) as made:
        yield made
