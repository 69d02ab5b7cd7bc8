"""docs/api.md and the code say the same.

Proves: the table of routes has every route that the gateway answers, with its family and whether it streams;
every error code that the gateway can answer with is in this page's table or in that of docs/admission.md, and
none is that it cannot; each example's route is one of the table.
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_gateway.web.routes import ROUTES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
OTHERS = (ROOT / "docs" / "admission.md").read_text()
SOURCES = "\n".join(path.read_text() for path in (ROOT / "gateway" / "src").rglob("*.py"))
RAISED = re.compile(
    r'GatewayError\(\s*(?:\d{3}|status), "(\w+)"|code(?:: str = |=)"(\w+)"|\(\d{3}, "(\w+)", "'
)
PLAIN = {"/models", "/v1/models", "/v1/models/{name}", "/health"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table with this heading's first cell."""
    table = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_route_is_in_the_table() -> None:
    told = {}
    for cells in rows("route"):
        for path in re.findall(r"`(?:POST |GET )?(/[^`]*)`", cells[0]):
            told[path] = (cells[1], not cells[2].startswith("no"))
    assert set(told) == set(ROUTES) | PLAIN
    assert {path: told[path] for path in ROUTES} == {
        path: (route.family.name, route.streams) for path, route in ROUTES.items()
    }


def test_every_error_code_is_told() -> None:
    raised = {code for found in RAISED.findall(SOURCES) for code in found if code}
    told = {code for cells in rows("status") for code in re.findall(r"`(\w+)`", cells[1])}
    assert told <= raised
    assert raised <= told | set(re.findall(r"`(\w+)`", OTHERS))


def test_each_example_asks_a_route_of_the_table() -> None:
    asked = set(re.findall(r"curl (?:-N )?localhost:3000(/\S*)", PAGE))
    assert asked - {"/v1/models/smollm2"} <= set(ROUTES) | PLAIN
    assert len(asked) > 15
