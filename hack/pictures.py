"""Draws each dashboard from its own JSON and what a Prometheus answers to its queries, into docs/dashboards.

    python hack/pictures.py http://127.0.0.1:9090 [--minutes 60] [--window 1m] [--end TIME] [--out FOLDER]

Not Grafana, and each picture says so: the panels, their places, queries, units and words are the dashboard's,
how they are drawn is ours. All variables stand at All.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import helm
import promql
import svg
from panel_pictures import Panel, Series, Span, draw

OUT = helm.ROOT / "docs" / "dashboards"
COLUMN, ROW = 60, 36  # pixels of Grafana's grid
GAP, HEAD = 8, 92  # between panels, and of the heading
COLUMNS = 24
POINTS = 120  # values of each line
OURS = '{__name__=~"vllm_gateway_connections|vllm_operator_leader"}'
NOTE = (
    "Drawn by hack/pictures.py from grafana/dashboards/{name} and the answers of a Prometheus. "
    "This is not Grafana."
)


class Answers(Protocol):
    def series(self, expr: str, span: Span) -> Sequence[Mapping[str, Any]]:
        """The series of a range query, each with `metric` and `values`. Raises OSError."""


@dataclass(frozen=True)
class Prometheus:
    """https://prometheus.io/docs/prometheus/latest/querying/api/"""

    url: str

    def series(self, expr: str, span: Span) -> Sequence[Mapping[str, Any]]:
        asked = {"query": expr, "start": span.start, "end": span.end, "step": span.step}
        address = f"{self.url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return list(json.load(answer)["data"]["result"])
        except urllib.error.HTTPError as error:
            raise OSError(f"{expr}: {error.read(500).decode(errors='replace')}") from error


def picture(name: str, dashboard: Mapping[str, Any], answers: Answers, span: Span, window: str) -> str:
    """The SVG of a dashboard. `name` is its file's; `window` is what $__rate_interval stands for."""
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    height = HEAD + max(place["y"] + place["h"] for place in places) * ROW + GAP
    panels = [
        svg.group(*corner(panel), placed(panel, answers, span, window)) for panel in dashboard["panels"]
    ]
    parts = [*heading(name, dashboard, span), *panels]
    return svg.document(
        COLUMNS * COLUMN + GAP, height, f"{dashboard['title']}. {NOTE.format(name=name)}", parts
    )


def heading(name: str, dashboard: Mapping[str, Any], span: Span) -> Iterator[str]:
    width = COLUMNS * COLUMN
    yield svg.text(GAP + 4, 30, dashboard["title"], 20, fill="#24292f", font_weight="600")
    yield svg.text(width, 30, during(span), 13, fill="#24292f", text_anchor="end")
    yield svg.text(GAP + 4, 51, dashboard["description"], 13, fill="#6b7280")
    yield svg.rect(GAP, 61, width - GAP, 22, fill="#fff3cd", stroke="#e6c75f", rx=3)
    yield svg.text(GAP + 10, 76, NOTE.format(name=name), 12, fill="#5f4b00")


def during(span: Span) -> str:
    start, end = (datetime.fromtimestamp(moment, UTC) for moment in (span.start, span.end))
    return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M} UTC"


def corner(panel: Panel) -> svg.Point:
    return panel["gridPos"]["x"] * COLUMN + GAP, HEAD + panel["gridPos"]["y"] * ROW


def placed(panel: Panel, answers: Answers, span: Span, window: str) -> Iterator[str]:
    if panel["type"] == "row":
        yield svg.text(4, ROW * 0.65, panel["title"], 15, fill="#24292f", font_weight="600")
        return
    width, height = panel["gridPos"]["w"] * COLUMN - GAP, panel["gridPos"]["h"] * ROW - GAP
    series = [
        Series(legend(target, found["metric"]), points(found["values"]), found["metric"])
        for target in panel["targets"]
        for found in answers.series(
            expanded(target, window), at_its_end(span) if target.get("instant") else span
        )
    ]
    yield from draw(panel, series, width, height, span)


def expanded(target: Mapping[str, Any], window: str) -> str:
    return promql.Query("", target["expr"]).expanded(window)


def at_its_end(span: Span) -> Span:
    return Span(span.end, span.end, span.step)


def points(values: Sequence[tuple[float, str]]) -> tuple[tuple[float, float], ...]:
    read = ((moment, float(value)) for moment, value in values)
    return tuple((moment, value) for moment, value in read if math.isfinite(value))


def legend(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """https://grafana.com/docs/grafana/latest/datasources/prometheus/query-editor/#legend"""
    fixed = str(target.get("legendFormat", ""))
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), fixed)


def span_of(minutes: float, end: float) -> Span:
    step = max(1.0, minutes * 60 / POINTS)
    return Span(end - minutes * 60, end, step)


def write(answers: Answers, span: Span, window: str, out: Path) -> None:
    """Writes a file for each dashboard. Raises OSError where there is nothing of ours to draw."""
    if not answers.series(OURS, span):
        raise OSError(f"nothing of a gateway or an operator was scraped, {during(span)}: docs/monitoring.md")
    out.mkdir(parents=True, exist_ok=True)
    for name, dashboard in promql.dashboards().items():
        path = out / Path(name).with_suffix(".svg")
        path.write_text(picture(name, dashboard, answers, span, window))
        print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of a Prometheus that scrapes the gateway, the operator and vLLM")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--window", default="1m", help="for $__rate_interval: four times the scrape interval (1m)"
    )
    parser.add_argument("--end", type=float, default=time.time(), help="seconds since 1970 (now)")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    try:
        write(Prometheus(given.url), span_of(given.minutes, given.end), given.window, given.out)
    except OSError as error:
        print(f"pictures: {given.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
