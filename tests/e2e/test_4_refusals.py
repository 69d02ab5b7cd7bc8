"""Invalid VLLMModels before the real API server and the running operator.

Proves: each row of the table that tests/operator runs through `parse` is refused by the API server, or
answered with Accepted=False, in words that name the field; nothing is made for it, and others go on.
"""

from __future__ import annotations

import json
from typing import Any

import cluster
import pytest
from vllm_models import InvalidCase, invalid_cases

NAMESPACE = "refusals"


@pytest.fixture(scope="module", autouse=True)
def namespace(release: None) -> Any:
    with cluster.lent_namespace(NAMESPACE):
        yield


def refusal(case: InvalidCase) -> str:
    """The words of the API server or, where that takes the resource, of the operator's condition."""
    body = case.body | {"metadata": case.body["metadata"] | {"namespace": NAMESPACE}}
    done = cluster.run(cluster.tool("kubectl"), "create", "-f", "-", stdin=json.dumps(body), check=False)
    if done.returncode:
        return done.stderr
    name = body["metadata"]["name"]
    try:
        return str(
            cluster.eventually(
                lambda: not_accepted(name).get("message"), f"{name} gets Accepted=False", 60, every=0.1
            )
        )
    finally:
        assert not cluster.items("deployments", f"vllm-fleet.dev/model={name}", NAMESPACE)
        cluster.delete("vllm", name, NAMESPACE)


def not_accepted(name: str) -> cluster.Manifest:
    found = cluster.condition(name, "Accepted", NAMESPACE)
    return found if found.get("status") == "False" else {}


@pytest.mark.parametrize("case", list(invalid_cases()), ids=lambda case: case.name)
def test_an_invalid_model_is_refused_by_field(case: InvalidCase) -> None:
    words = refusal(case)
    assert case.field in words, words


def test_the_models_beside_them_go_on(smollm2: str) -> None:
    assert cluster.condition(smollm2, "Accepted")["status"] == "True"
    assert cluster.condition(smollm2, "Ready")["status"] == "True"
