"""What dashboards and rules ask Prometheus for, and what an expression selects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import promql_parser
import yaml

import helm

DASHBOARDS = helm.ROOT / "grafana" / "dashboards"
ALERTS = helm.ROOT / "grafana" / "alerts"


@dataclass(frozen=True)
class Query:
    """An expression with Grafana's variables in it, where it stands, and the legend of its series."""

    where: str
    expr: str
    legend: str = ""

    def expanded(self, window: str = "5m") -> str:
        """As Grafana would send it with all variables on All."""
        text = self.expr.replace("$__rate_interval", window).replace("${namespace:regex}", ".+")
        return re.sub(r'"\$\w+"', '".+"', text)


@dataclass(frozen=True)
class Selector:
    """`matchers` are of all labels but the name; a selector with several names is one for each."""

    name: str
    matchers: tuple[str, ...] = ()
    labels: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.name}{{{', '.join(self.matchers)}}}" if self.matchers else self.name


def dashboards() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def dashboard_queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Those of its panels, and of the variables that ask for the values of a label."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], target["expr"], target.get("legendFormat", ""))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            if not found:
                raise ValueError(f"variable {variable['name']} is not label_values(…)")
            yield Query(variable["name"], found[1], f"{{{{{found[2]}}}}}")


def rules() -> list[dict[str, Any]]:
    """Every rule, recording ones and alerts, in their order."""
    files = [yaml.safe_load(path.read_text()) for path in sorted(ALERTS.glob("*.yaml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def rule_queries() -> Iterator[Query]:
    for rule in rules():
        yield Query(rule.get("alert") or rule["record"], rule["expr"])


def nodes(expr: str) -> list[promql_parser.Expr]:
    """Every part of an expression. Raises ValueError where it is not PromQL."""
    found: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(expr), pre_visit=found.append)
    return found


def selectors(expr: str) -> Iterator[Selector]:
    """What an expression reads. A name may also stand as `{__name__=~"a|b"}`."""
    for node in nodes(expr):
        if isinstance(node, promql_parser.VectorSelector):  # also the one in a range
            yield from _named(node)


def _named(selector: promql_parser.VectorSelector) -> Iterator[Selector]:
    matchers = selector.matchers.matchers
    names = [m.value for m in matchers if m.name == "__name__"]
    others = [m for m in matchers if m.name != "__name__"]
    found = Selector(
        "",
        tuple(f'{m.name}{OPERATORS[str(m.op)]}"{m.value}"' for m in others),
        frozenset(m.name for m in others),
    )
    for name in [selector.name] if selector.name else names[0].split("|"):
        yield replace(found, name=name)


OPERATORS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


def grouped(expr: str) -> frozenset[str]:
    """The labels that aggregations keep, all of them together."""
    return frozenset(
        label
        for node in nodes(expr)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier
        for label in node.modifier.labels
    )
