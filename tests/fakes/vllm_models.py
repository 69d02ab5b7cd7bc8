"""VLLMModels for tests: a valid one to start from, and the table of invalid ones.

The same table runs through the operator's parse() (tests/operator) and through a real API server (tests/e2e).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

TABLE = Path(__file__).resolve().parents[1] / "operator" / "invalid_models.yaml"


def model_body(name: str = "m", namespace: str = "ns", **spec: Any) -> dict[str, Any]:
    """A small valid model; `spec` replaces or adds top-level fields, and a None takes one away."""
    fields = {"model": "org/small"} | spec
    return {
        "apiVersion": "vllm-fleet.dev/v1alpha1",
        "kind": "VLLMModel",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {key: copy.deepcopy(value) for key, value in fields.items() if value is not None},
    }


@dataclass(frozen=True)
class InvalidCase:
    """`field` is what a message must name.

    `door` says who refuses it: `schema`, the API server by schema or CEL, and parse() with the same field;
    `operator`, only parse(): the API server takes it and the operator answers `Accepted=False`.
    """

    name: str
    body: dict[str, Any]
    field: str
    door: Literal["schema", "operator"]


def invalid_cases() -> Iterator[InvalidCase]:
    for row in yaml.safe_load(TABLE.read_text()):
        body = model_body(row.get("name", "invalid"), **row.get("spec", {}))
        if row.get("without"):
            del body["spec"][row["without"]]
        yield InvalidCase(row["case"], body, row["field"], row.get("door", "schema"))
