"""What a pod asks of a node, counted as the scheduler counts.

Proves: quantities in every form that Kubernetes writes; a limit stands for a request that is not there;
containers add up, an init container counts where it alone is more, sidecars run beside all that come after
them; overhead and requests of the pod as a whole; what is not counted, and what cannot be read, is left out.
"""

from __future__ import annotations

from typing import Any

import pytest

from vllm_operator.render.requests import counted, requested

Json = dict[str, Any]


def asks(cpu: str, restart: str | None = None) -> Json:
    policy = {"restartPolicy": restart} if restart else {}
    return {"resources": {"requests": {"cpu": cpu}}, **policy}


@pytest.mark.parametrize(
    ("name", "quantity", "wanted"),
    [
        ("cpu", "4", 4000),
        ("cpu", "500m", 500),
        ("cpu", "0.1", 100),
        ("cpu", "1u", 1),
        ("cpu", 2, 2000),
        ("memory", "1Gi", 2**30),
        ("memory", "1.5Gi", 3 * 2**29),
        ("memory", "1G", 10**9),
        ("memory", "1e3", 1000),
        ("memory", "128974848000m", 128974848),
        ("nvidia.com/gpu", "8", 8),
        ("memory", "much", 0),
    ],
)
def test_quantities(name: str, quantity: Any, wanted: int) -> None:
    assert counted({name: quantity}) == {name: wanted}


def test_only_what_the_ledger_keeps_is_counted() -> None:
    assert counted({"pods": "110", "ephemeral-storage": "1Gi", "hugepages-2Mi": "4Mi"}) == {}


def test_a_limit_stands_for_a_request_that_is_not_there() -> None:
    resources = {"limits": {"cpu": "2", "memory": "1Ki"}, "requests": {"cpu": "1"}}
    assert requested({"containers": [{"resources": resources}]}) == {"cpu": 1000, "memory": 1024}


@pytest.mark.parametrize(
    ("init", "wanted"),
    [
        ([], 3000),
        ([asks("2")], 3000),
        ([asks("5")], 5000),
        ([asks("1", "Always")], 4000),
        ([asks("1", "Always"), asks("5")], 6000),
        ([asks("5"), asks("1", "Always")], 5000),
        ([asks("1", "Always"), asks("2", "Always")], 6000),
    ],
)
def test_init_containers_and_sidecars(init: list[Json], wanted: int) -> None:
    assert requested({"containers": [asks("1"), asks("2")], "initContainers": init})["cpu"] == wanted


def test_overhead_and_the_pod_as_a_whole() -> None:
    pod = {"containers": [asks("1")], "overhead": {"cpu": "250m"}}
    assert requested(pod) == {"cpu": 1250}
    assert requested(pod | asks("4")) == {"cpu": 4250}
    assert requested({}) == {}
