"""Pictures of the dashboards, drawn from their JSON and what a Prometheus answers.

Proves: every panel of every dashboard is in its picture, with the words that say whose it is; a panel without
data says why in the dashboard's words; lines break where values are missing, stacks add up, a stat has the
colour of its threshold, tables and states the words of their mappings, a legend that does not fit says how
much is missing; values read like Grafana's; a Prometheus that is away, refuses a query or has nothing of ours
is an error with its address. That a real Prometheus answers is shown in tests/e2e/test_8_monitoring.py.
"""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import panel_pictures
import pictures
import promql
import svg
import units
from panel_pictures import Series, Span

SPAN = Span(1_795_400_000.0, 1_795_400_480.0, 4.0)
LABELS = {"model": "default/smollm2", "reason": "Serving"}


class Same:
    """The same two series for each query, or none."""

    def __init__(self, value: str = "1", count: int = 2) -> None:
        self.value, self.count = value, count

    def series(self, expr: str, span: Span) -> Sequence[Mapping[str, Any]]:
        times = {span.start, span.end}
        return [
            {
                "metric": LABELS | {"pod": f"pod-{number}"},
                "values": [(time, self.value) for time in sorted(times)],
            }
            for number in range(self.count)
        ]


def words(text: str) -> list[str]:
    root = ElementTree.fromstring(text)
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def drawn(kind: str, *series: Series, **settings: Any) -> str:
    """The SVG of one panel."""
    found = next(
        panel
        for dashboard in promql.dashboards().values()
        for panel in dashboard["panels"]
        if panel["type"] == kind
    )
    defaults = found["fieldConfig"]["defaults"] | settings
    panel = found | {"fieldConfig": found["fieldConfig"] | {"defaults": defaults}}
    return svg.document(480, 280, "a panel", list(panel_pictures.draw(panel, series, 480, 280, SPAN)))


def line(name: str, *values: float, **labels: str) -> Series:
    return Series(name, tuple((SPAN.start + 4 * index, value) for index, value in enumerate(values)), labels)


@pytest.mark.parametrize("name", promql.dashboards())
def test_a_picture_has_every_panel_and_says_whose_it_is(name: str) -> None:
    dashboard = promql.dashboards()[name]
    seen = words(pictures.picture(name, dashboard, Same(), SPAN, "1m"))
    for panel in dashboard["panels"]:
        assert any(word.rstrip("…") and panel["title"].startswith(word.rstrip("…")) for word in seen), panel[
            "title"
        ]
    assert any("This is not Grafana" in word and f"grafana/dashboards/{name}" in word for word in seen)
    assert "2026-11-23 02:13 to 02:21 UTC" in seen


@pytest.mark.parametrize("answers", [Same(count=0), Same("NaN")], ids=["no series", "no number"])
def test_without_data_each_panel_says_why(answers: Same) -> None:
    for name, dashboard in promql.dashboards().items():
        seen = words(pictures.picture(name, dashboard, answers, SPAN, "1m"))
        wanted = [p["fieldConfig"]["defaults"]["noValue"] for p in dashboard["panels"] if p["type"] != "row"]
        assert sorted(word for word in seen if word in wanted) == sorted(wanted)


def test_a_line_breaks_where_values_are_missing() -> None:
    points = [(0.0, 1.0), (4.0, 1.0), (16.0, 1.0)]
    assert panel_pictures.pieces(points, 4) == [points[:2], points[2:]]


def test_a_stack_adds_up() -> None:
    layers = panel_pictures.stack([line("a", 1, 2), line("b", 10), line("c", 100, 100)])
    assert [[value for _, value in upper] for upper, _ in layers] == [[1, 2], [11, 2], [111, 102]]
    assert [value for _, value in layers[2][1]] == [11, 2]


@pytest.mark.parametrize(
    ("value", "colour"), [(0.0, "green"), (0.01, "orange"), (0.049, "orange"), (0.7, "red")]
)
def test_a_stat_has_the_colour_of_its_threshold(value: float, colour: str) -> None:
    steps = [
        {"color": "green", "value": None},
        {"color": "orange", "value": 0.01},
        {"color": "red", "value": 0.05},
    ]
    panel = {"fieldConfig": {"defaults": {"thresholds": {"steps": steps}}}}
    assert panel_pictures.threshold_colour(panel, value) == colour


def test_a_stat_shows_the_last_value_of_each_series_and_its_name() -> None:
    seen = words(drawn("stat", line("ready", 5, 3), line("not ready", 0, 1), decimals=0))
    assert seen[1:] == ["3", "ready", "1", "not ready"]


def test_a_legend_says_how_much_of_it_is_missing() -> None:
    seen = words(
        drawn("timeseries", *(line(f"a-pod-with-a-long-name-{number}", 1, 2) for number in range(20)))
    )
    shown = sum(word.startswith("a-pod") for word in seen)
    assert shown > 3
    assert f"… and {20 - shown} more" in seen


def test_a_table_has_the_columns_and_words_of_the_dashboard() -> None:
    rows = (line("", 1, model="ns/a", reason="Serving"), line("", 0, model="ns/b", reason="InsufficientGPU"))
    seen = words(drawn("table", *rows))
    assert seen[1:] == [
        "Model",
        "Reason",
        "Ready",
        "ns/a",
        "Serving",
        "ready",
        "ns/b",
        "InsufficientGPU",
        "not ready",
    ]


def test_a_state_has_a_bar_for_each_time_without_a_change() -> None:
    seen = words(drawn("state-timeline", line("ns/a: Serving", *[0] * 60, *[1] * 60)))
    assert [word for word in seen if "ready" in word] == ["not ready", "ready"]


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "written"),
    [
        (0, "short", None, "0"),
        (12.3456, "short", 1, "12.3"),
        (1234, "short", None, "1.23 K"),
        (0.0123, "percentunit", 2, "1.23%"),
        (0.25, "s", None, "250 ms"),
        (90, "s", None, "1.5 min"),
        (0.00005, "s", None, "50 µs"),
        (2.5, "reqps", None, "2.5 req/s"),
        (-3.0, "short", None, "-3"),
    ],
)
def test_values_read_like_grafanas(value: float, unit: str, decimals: int | None, written: str) -> None:
    assert units.readable(value, unit, decimals) == written


def test_an_unknown_unit_is_an_error() -> None:
    with pytest.raises(ValueError, match="unit 'bytes' is not known"):
        units.readable(1, "bytes")


@pytest.mark.parametrize("top", [0.003, 0.9, 1, 7, 99, 12345])
def test_ticks_are_few_and_reach_the_top(top: float) -> None:
    marks = units.ticks(top)
    assert marks[0] == 0
    assert marks[-1] >= top * 0.999
    assert 4 <= len(marks) <= 8


class Refusing(BaseHTTPRequestHandler):
    """Answers each query with the status and the body of its server."""

    server: Answering

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None: ...


class Answering(ThreadingHTTPServer):
    status, body = 200, b""


@contextmanager
def serving(status: int, body: bytes) -> Iterator[str]:
    with Answering(("127.0.0.1", 0), Refusing) as server:
        server.status, server.body = status, body
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"error": "parse error"}', "parse error"),
        (200, b'{"data": {"result": []}}', "nothing of a gateway or an operator was scraped"),
    ],
)
def test_a_prometheus_that_has_no_answer_is_an_error(
    status: int, body: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status, body) as url:
        assert pictures.main([url, "--out", str(tmp_path)]) == 1
        seen = capsys.readouterr().err
    assert f"pictures: {url}: " in seen
    assert said in seen
    assert list(tmp_path.iterdir()) == []


def test_a_prometheus_that_is_away_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(200, b"") as url:
        pass
    assert pictures.main([url, "--out", str(tmp_path)]) == 1
    assert "refused" in capsys.readouterr().err
