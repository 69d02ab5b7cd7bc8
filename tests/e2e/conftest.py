"""One installed release and one served model for all tests here; each test leaves both as it found them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest
import releases


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
        cluster.eventually(lambda: routed(port, smollm2), f"{smollm2} is routed by the gateway", 30)
        yield port


def routed(port: int, name: str) -> bool:
    import httpx

    answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).json()
    return name in {entry["id"] for entry in answer["data"]}
