"""One installed release and one served model for all tests here; each test leaves both as it found them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import cluster
import pytest
import releases
from operators import Operators, alone, own_namespace
from streams import wait_routed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    if not cluster.is_the_drivers_own():
        others = [item for item in items if item.get_closest_marker("local_cluster")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def release() -> None:
    """The chart, installed as a user would, in a namespace that enforces Pod Security `restricted`."""
    assert cluster.has_kubeconfig(), "KUBECONFIG names no cluster: run `make test-e2e`"
    cluster.apply(releases.namespace(cluster.SYSTEM_NAMESPACE))
    releases.install()


@pytest.fixture(scope="session")
def smollm2(release: None) -> Iterator[str]:
    """The demo's model, served by a real vLLM; yields its name."""
    cluster.apply(cluster.example("smollm2.yaml"))
    cluster.wait_settled("smollm2", seconds=300)
    yield "smollm2"
    cluster.delete("vllm", "smollm2")


@pytest.fixture
def gateway(smollm2: str) -> Iterator[int]:
    """A local port that reaches the gateway's API."""
    with cluster.port_forward("svc/vllm-fleet-gateway", 3000) as port:
        wait_routed(port, smollm2)
        yield port


@pytest.fixture(scope="module")
def without_the_releases_operator(release: None) -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace of the test's own."""
    with own_namespace() as name:
        yield name


@pytest.fixture
def operators(without_the_releases_operator: None, namespace: str, tmp_path: Path) -> Iterator[Operators]:
    """Starts operators for the test's namespace, which are the only ones; they end with the test."""
    with ExitStack() as stack:
        yield Operators(stack, tmp_path, (namespace,))
