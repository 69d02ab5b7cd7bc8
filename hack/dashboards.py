"""Grafana dashboards, made from the short descriptions in grafana/sources.

A description names rows of panels, and each panel its queries; what every panel has in common (data source,
place, colours, links) is here. Panels flow from left to right, so that inserting one moves no numbers.
The JSON is Grafana's dashboard schema v1; the tests read it back with Grafana's own SDK.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

import helm

SOURCES = helm.ROOT / "grafana" / "sources"
WIDTH = 24  # columns of Grafana's grid
SIZES = {"stat": (4, 4), "timeseries": (8, 8), "table": (8, 8), "state-timeline": (24, 6)}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
QUANTILES = {"P50": "0.50", "P95": "0.95", "P99": "0.99"}
MODELS = '{__name__=~"vllm_operator_model_ready|vllm_gateway_requests_total|vllm:num_requests_running"%s}'
IN_NAMESPACE = ', model=~"(${namespace:regex})/.+"'
MODEL_PAGE = "/d/vllm-fleet-model?${datasource:queryparam}&${__url_time_range}&var-model="
Json = dict[str, Any]


class Description(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Query(Description):
    expr: str
    legend: str = ""


class Panel(Description):
    """`quantiles` is a histogram with its selector, of which P50, P95 and P99 are shown.

    `thresholds` maps a colour to the value from which it holds; below the first it is green.
    """

    title: str
    kind: Literal["stat", "timeseries", "table", "state-timeline"] = "timeseries"
    description: str = ""
    unit: str = "short"
    decimals: int | None = None
    max: float | None = None
    width: int | None = None
    empty: str = "no data"
    stacked: bool = False
    thresholds: dict[str, float] = {}
    to_model: bool = False
    quantiles: str = ""
    queries: tuple[Query, ...] = ()

    def targets(self) -> tuple[Query, ...]:
        if not self.quantiles:
            return self.queries
        metric, brace, selector = self.quantiles.partition("{")
        rate = f"rate({metric}_bucket{brace}{selector}[$__rate_interval])"
        return tuple(
            Query(legend=name, expr=f"histogram_quantile({quantile}, sum by (le) ({rate}))")
            for name, quantile in QUANTILES.items()
        )


class Row(Description):
    title: str = ""
    panels: tuple[Panel, ...]


class Source(Description):
    uid: str = Field(max_length=40)
    title: str
    description: str
    variables: tuple[Literal["namespace", "model", "release"], ...]
    rows: tuple[Row, ...]


@dataclass
class Cursor:
    """Where the next panel goes."""

    x: int = 0
    y: int = 0
    height: int = 0
    number: int = 0

    def place(self, width: int, height: int) -> Json:
        """The id and the place of a panel."""
        if self.x + width > WIDTH:
            self.line()
        place = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.x, self.height, self.number = self.x + width, max(self.height, height), self.number + 1
        return {"id": self.number, "gridPos": place}

    def line(self) -> None:
        self.x, self.y, self.height = 0, self.y + self.height, 0


def dashboards() -> dict[str, str]:
    """The text of each dashboard, by the name of its file."""
    sources = {
        path.stem: Source(**yaml.safe_load(path.read_text())) for path in sorted(SOURCES.glob("*.yaml"))
    }
    return {
        f"{name}.json": json.dumps(dashboard(source), indent=2, ensure_ascii=False) + "\n"
        for name, source in sources.items()
    }


def dashboard(source: Source) -> Json:
    return {
        "uid": source.uid,
        "title": source.title,
        "description": source.description,
        "tags": ["vllm-fleet"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "editable": True,
        "links": [links()],
        "templating": {"list": [variable(name) for name in ("datasource", *source.variables)]},
        "panels": list(panels(source.rows)),
    }


def links() -> Json:
    """The other dashboards of the fleet, with the same data source, time and chosen models."""
    return {
        "type": "dashboards",
        "title": "vLLM Fleet",
        "tags": ["vllm-fleet"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }


def variable(name: str) -> Json:
    if name == "datasource":
        return {"name": name, "label": "Data source", "type": "datasource", "query": "prometheus"}
    query, label, extra = {
        "namespace": (
            f"label_values({MODELS % ''}, model)",
            "Namespace",
            {
                "regex": r"/^([^\/]+)\//",
                "description": "Of the models: the part of their names before the slash.",
            },
        ),
        "model": (f"label_values({MODELS % IN_NAMESPACE}, model)", "Model", {}),
        "release": (
            'label_values({__name__=~"vllm_gateway_connections|vllm_operator_leader"}, namespace)',
            "Release",
            {"description": "The namespace that the gateway and the operator run in."},
        ),
    }[name]
    common = {
        "name": name,
        "label": label,
        "type": "query",
        "refresh": 2,
        "sort": 1,
        "datasource": DATASOURCE,
    }
    every = {"multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}}
    return common | {"query": {"refId": name, "query": query}} | extra | every


def panels(rows: Iterable[Row]) -> Iterator[Json]:
    cursor = Cursor()
    for row in rows:
        cursor.line()
        if row.title:
            yield {"type": "row", "title": row.title, "collapsed": False, "panels": []} | cursor.place(
                WIDTH, 1
            )
        for described in row.panels:
            width, height = SIZES[described.kind]
            yield panel(described) | cursor.place(described.width or width, height)


def panel(described: Panel) -> Json:
    made: Json = {"type": described.kind, "title": described.title}
    if described.description:
        made["description"] = described.description
    made |= {"datasource": DATASOURCE, "fieldConfig": field_config(described)}
    if described.kind == "table":
        made |= TABLE
    elif described.kind == "stat":
        made["options"] = {"textMode": "auto" if len(described.targets()) == 1 else "value_and_name"}
    return made | {"targets": list(targets(described))}


# Only the labels and the value, under the names that people use.
TABLE: Json = {
    "transformations": [
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True},
                "renameByName": {"model": "Model", "reason": "Reason", "Value": "Ready"},
            },
        }
    ]
}


def targets(described: Panel) -> Iterator[Json]:
    for letter, query in zip("ABCDEFGH", described.targets(), strict=False):
        target: Json = {"refId": letter, "datasource": DATASOURCE, "expr": query.expr}
        if described.kind == "table":
            target |= {"format": "table", "instant": True}
        if query.legend:
            target["legendFormat"] = query.legend
        yield target


def field_config(described: Panel) -> Json:
    defaults: Json = {"unit": described.unit, "noValue": described.empty}
    if described.decimals is not None:
        defaults["decimals"] = described.decimals
    if described.kind == "timeseries":
        defaults |= {
            "min": 0,
            "custom": {"fillOpacity": 30, "stacking": {"mode": "normal"}}
            if described.stacked
            else {"fillOpacity": 5},
        }
    if described.max is not None:
        defaults["max"] = described.max
    if described.thresholds or described.kind == "stat":  # left out, Grafana paints a stat red from 80 on
        steps: list[Json] = [{"color": "green", "value": None}]
        steps += [{"color": colour, "value": value} for colour, value in described.thresholds.items()]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if described.kind == "state-timeline":
        defaults["mappings"] = [READY]
    overrides: list[Json] = []
    if described.to_model and described.kind == "table":
        overrides += [
            override("Model", "links", [model_link("${__value.raw}")]),
            override("Ready", "mappings", [READY]),
        ]
    elif described.to_model:
        defaults["links"] = [model_link("${__field.labels.model}")]
    return {"defaults": defaults, "overrides": overrides}


READY: Json = {
    "type": "value",
    "options": {"0": {"text": "not ready", "color": "red"}, "1": {"text": "ready", "color": "green"}},
}


def override(field: str, name: str, value: Any) -> Json:
    return {"matcher": {"id": "byName", "options": field}, "properties": [{"id": name, "value": value}]}


def model_link(model: str) -> Json:
    return {"title": "This model", "url": MODEL_PAGE + model}
