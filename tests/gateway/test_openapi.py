"""The OpenAPI document and what the gateway does, compared by machine.

Proves: the document has every route that is answered, and no other; requests made from it, right and wrong
ones, the same in each run, never get a 500 and always an answer that the document has: its status, its
content type, its shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import families
import pytest
import schemathesis
from engine import FakeEngine
from http_caller import get
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from vllm_gateway.web.routes import ROUTES

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PLAIN = {"/models", "/health", "/v1/models", "/v1/models/{name}"}
STEADY = settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def operations(document: dict[str, Any]) -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        yield found.ok()


def can_be_wrong(operation: Any) -> bool:
    """A request without a body cannot: any text is a name."""
    return bool(operation.body)


def fuzz(operation: Any, mode: GenerationMode, url: str) -> int:
    """How many requests were made."""
    made = 0

    @STEADY
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        nonlocal made
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=10)
        made += 1

    one()
    return made


async def test_the_document_has_every_route(raw_gateway: Any) -> None:
    async with FakeEngine() as engine, raw_gateway(engine) as running:
        document = (await get(running.port, "/openapi.json")).json()
        assert set(document["paths"]) == set(ROUTES) | PLAIN
        names = [each["operationId"] for path in document["paths"].values() for each in path.values()]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_requests_made_from_it_are_answered_as_it_says(raw_gateway: Any, mode: GenerationMode) -> None:
    async with FakeEngine(families.script()) as engine, raw_gateway(engine) as running:
        document = (await get(running.port, "/openapi.json")).json()
        url = f"http://127.0.0.1:{running.port}"

        def all_of_them() -> int:
            chosen = filter(can_be_wrong if mode is GenerationMode.NEGATIVE else None, operations(document))
            return sum(fuzz(operation, mode, url) for operation in chosen)

        assert await asyncio.to_thread(all_of_them) >= 6 * len(ROUTES)
        await running.settled()
