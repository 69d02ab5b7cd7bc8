"""One panel of a dashboard as SVG: settings as Grafana's JSON has them, data as Prometheus gave them.

Pure. Each `draw_…` gets the panel, its series and the size of the space under the title, and gives shapes
whose origin is that space's upper left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby, pairwise
from typing import Any

import svg
from units import readable, ticks

Panel = Mapping[str, Any]
COLOURS = (
    "#3d71d9",
    "#e8833a",
    "#4c9a52",
    "#d6455d",
    "#8f62c8",
    "#2aa5a0",
    "#c9a227",
    "#8a6d5a",
    "#5b6b7f",
    "#d072b4",
)
NAMED = {"green": "#3f9142", "orange": "#e07b1f", "red": "#d13b4b"}
INK, FAINT, GRID = "#24292f", "#6b7280", "#e5e7eb"
TITLE, LEGEND_LINE, LEGEND_LINES = 36, 15, 4
SMALL = 10.5


@dataclass(frozen=True)
class Span:
    """From `start` to `end`, in seconds since 1970, with a value every `step`."""

    start: float
    end: float
    step: float


@dataclass(frozen=True)
class Series:
    """`points` are (time, value), without those that are not numbers; a table has one point each."""

    name: str
    points: tuple[tuple[float, float], ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Space:
    """What a panel can draw on, in pixels, and the time that it shows."""

    width: float
    height: float
    span: Span


def draw(panel: Panel, series: Sequence[Series], width: float, height: float, span: Span) -> Iterator[str]:
    """The whole panel. Raises KeyError for a kind that is not drawn here."""
    yield svg.rect(0.5, 0.5, width - 1, height - 1, fill="#ffffff", stroke="#dde1e6", rx=4)
    yield svg.text(12, 20, svg.clipped(panel["title"], 13, width - 24), 13, fill=INK, font_weight="600")
    space = Space(width - 24, height - TITLE - 10, span)
    with_values = [one for one in series if one.points]
    body = KINDS[panel["type"]](panel, with_values, space) if with_values else nothing(panel, space)
    yield svg.group(12, TITLE, body)


def defaults(panel: Panel) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = panel["fieldConfig"]["defaults"]
    return settings


def shown(panel: Panel, value: float) -> str:
    settings = defaults(panel)
    return readable(value, settings["unit"], settings.get("decimals"))


def nothing(panel: Panel, space: Space) -> Iterator[str]:
    words = defaults(panel)["noValue"]
    yield svg.text(space.width / 2, space.height / 2, words, 13, fill=FAINT, text_anchor="middle")


# --- stat


def draw_stat(panel: Panel, series: Sequence[Series], space: Space) -> Iterator[str]:
    """The last value of each series, side by side, over the course of each."""
    width = space.width / len(series)
    for index, one in enumerate(series):
        colour = NAMED[threshold_colour(panel, one.last)]
        yield from sparkline(one, index * width, width - 6 * (len(series) > 1), space, colour)
        x, size = (index + 0.5) * width, 26
        value = shown(panel, one.last)
        while svg.text_width(value, size) > width - 8:
            size -= 1
        named = len(series) > 1
        yield svg.text(x, 34, value, size, fill=colour, font_weight="600", text_anchor="middle")
        if named:
            name = svg.clipped(one.name, SMALL, width - 6)
            yield svg.text(x, 52, name, SMALL, fill=FAINT, text_anchor="middle")


def threshold_colour(panel: Panel, value: float) -> str:
    """The colour of the highest step that the value has reached; the first step has no value."""
    reached = [
        step
        for step in defaults(panel)["thresholds"]["steps"]
        if step["value"] is None or value >= step["value"]
    ]
    return str(reached[-1]["color"])


def sparkline(one: Series, left: float, width: float, space: Space, colour: str) -> Iterator[str]:
    top, bottom = 60.0, space.height + 4
    highest = max((value for _, value in one.points), default=0) or 1.0
    points = [
        (left + x * width, bottom - max(value, 0) / highest * (bottom - top))
        for x, value in ((where(time, space.span), value) for time, value in one.points)
    ]
    yield svg.area([(points[0][0], bottom), *points, (points[-1][0], bottom)], fill=colour, fill_opacity=0.12)
    yield svg.line(points, stroke=colour, stroke_width=1.2)


def where(time: float, span: Span) -> float:
    """0 at the start, 1 at the end."""
    return (time - span.start) / (span.end - span.start)


# --- timeseries


@dataclass(frozen=True)
class Plot:
    """Where values and times are; `left` and `bottom` are the margins of the axes' words."""

    left: float
    width: float
    height: float
    top: float
    span: Span

    def at(self, time: float, value: float) -> svg.Point:
        return self.left + where(time, self.span) * self.width, self.height * (1 - value / self.top)


def draw_timeseries(panel: Panel, series: Sequence[Series], space: Space) -> Iterator[str]:
    entries = [(one.name, COLOURS[index % len(COLOURS)]) for index, one in enumerate(series)]
    lines = legend_lines(entries, space.width)
    height = space.height - 18 - LEGEND_LINE * len(lines)
    stacked = defaults(panel)["custom"].get("stacking", {}).get("mode") == "normal"
    layers = stack(series) if stacked else [(one.points, ()) for one in series]
    marks = axis(panel, max(value for upper, _ in layers for _, value in upper))
    words = [shown_tick(panel, mark) for mark in marks]
    left = max(svg.text_width(word, SMALL) for word in words) + 8
    plot = Plot(left, space.width - left - 6, height, marks[-1], space.span)
    yield from axes(plot, marks, words)
    opacity = defaults(panel)["custom"]["fillOpacity"] / 100
    for (upper, lower), (_, colour) in zip(layers, entries, strict=True):
        yield from curve(plot, upper, lower, colour, opacity)
    for index, row in enumerate(lines):
        yield from legend(row, space.height - LEGEND_LINE * (len(lines) - index - 1) + 2)


def axis(panel: Panel, highest: float) -> list[float]:
    """The values of the ticks. The panel's own maximum holds, as in Grafana."""
    if "max" in defaults(panel):
        return ticks(defaults(panel)["max"], 4)
    return ticks(highest * 1.05 if highest > 0 else 1.0, 4)


def shown_tick(panel: Panel, mark: float) -> str:
    return readable(round(mark, 12), defaults(panel)["unit"])


def axes(plot: Plot, marks: Sequence[float], words: Sequence[str]) -> Iterator[str]:
    for mark, word in zip(marks, words, strict=True):
        _, y = plot.at(plot.span.start, mark)
        yield svg.line([(plot.left, y), (plot.left + plot.width, y)], stroke=GRID)
        yield svg.text(plot.left - 6, y + 3.5, word, SMALL, fill=FAINT, text_anchor="end")
    for time in time_marks(plot.span):
        x, _ = plot.at(time, 0)
        yield svg.line([(x, 0), (x, plot.height)], stroke=GRID)
        yield svg.text(x, plot.height + 14, clock(time), SMALL, fill=FAINT, text_anchor="middle")


def time_marks(span: Span) -> list[float]:
    """Whole minutes, about five of them, that are not at the very edge."""
    step = next(
        s
        for s in (60, 120, 300, 600, 900, 1800, 3600, 14400, 86400, float("inf"))
        if (span.end - span.start) / s <= 6
    )
    first, margin = span.start // step * step + step, (span.end - span.start) / 40
    marks = [first + index * step for index in range(7)]
    return [mark for mark in marks if span.start + margin <= mark <= span.end - margin]


def clock(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%H:%M")


Points = Sequence[tuple[float, float]]


def stack(series: Sequence[Series]) -> list[tuple[Points, Points]]:
    """Each series' upper and lower edge. Where one has no value it adds nothing."""
    times = sorted({time for one in series for time, _ in one.points})
    lower = dict.fromkeys(times, 0.0)
    layers: list[tuple[Points, Points]] = []
    for one in series:
        values = dict(one.points)
        upper = {time: lower[time] + values.get(time, 0.0) for time in times}
        layers.append((tuple(upper.items()), tuple(lower.items())))
        lower = upper
    return layers


def curve(plot: Plot, upper: Points, lower: Points, colour: str, opacity: float) -> Iterator[str]:
    """A line and the area under it, broken where values are missing."""
    floor = dict(lower)
    for piece in pieces(upper, plot.span.step):
        edge = [plot.at(time, min(value, plot.top)) for time, value in piece]
        if len(edge) == 1:
            edge = [(edge[0][0] - 1, edge[0][1]), (edge[0][0] + 1, edge[0][1])]
        if opacity > 0.1:  # a fainter one is not worth its size in the file
            ground = [plot.at(time, floor.get(time, 0.0)) for time, _ in reversed(piece)]
            yield svg.area([*edge, *ground], fill=colour, fill_opacity=opacity)
        yield svg.line(edge, stroke=colour, stroke_width=1.4)


def pieces(points: Points, step: float) -> list[list[tuple[float, float]]]:
    """Runs of points that are not further apart than one step."""
    found = [[points[0]]]
    for before, point in pairwise(points):
        if point[0] - before[0] > step * 1.5:
            found.append([])
        found[-1].append(point)
    return found


Entry = tuple[str, str]


def legend_lines(entries: Sequence[Entry], width: float) -> list[list[tuple[float, Entry]]]:
    """Lines of (x, entry), as many as there may be; the last one says how many did not fit."""
    lines: list[list[tuple[float, Entry]]] = [[]]
    x = 0.0
    for index, (name, colour) in enumerate(entries):
        words = svg.clipped(name, SMALL, width - 20)
        room = svg.text_width(words, SMALL) + 30
        if x + room - 10 > width and lines[-1]:
            if len(lines) == LEGEND_LINES:
                lines[-1][-1] = (lines[-1][-1][0], (f"… and {len(entries) - index + 1} more", "none"))
                break
            lines.append([])
            x = 0.0
        lines[-1].append((x, (words, colour)))
        x += room
    return lines


def legend(row: Sequence[tuple[float, Entry]], y: float) -> Iterator[str]:
    for x, (name, colour) in row:
        yield svg.rect(x, y - 5, 12, 3, fill=colour, rx=1)
        yield svg.text(x + 16, y, name, SMALL, fill=INK)


# --- table, state-timeline


def draw_table(panel: Panel, series: Sequence[Series], space: Space) -> Iterator[str]:
    """Labels and the value, under the names that the panel gives them."""
    names = sorted({label for one in series for label in one.labels})
    rows: list[list[str | float]] = [
        [*(one.labels.get(name, "") for name in names), one.last] for one in series
    ]
    heads = [renamed(panel, name) for name in (*names, "Value")]
    last = 70.0
    width = (space.width - last) / len(names) if names else space.width
    for column, head in enumerate(heads):
        yield svg.text(column * width, 12, head, 11, fill=FAINT, font_weight="600")
    fit = int((space.height - 20) // 22)
    for index, row in enumerate(rows[:fit]):
        y = 34 + index * 22
        yield svg.line([(0, y - 15), (space.width, y - 15)], stroke=GRID)
        for column, cell in enumerate(row):
            words, colour = cell_words(panel, heads[column], cell)
            yield svg.text(column * width, y, svg.clipped(words, 12, width - 8), 12, fill=colour)


def renamed(panel: Panel, name: str) -> str:
    (organize,) = panel["transformations"]
    return str(organize["options"]["renameByName"].get(name, name))


def cell_words(panel: Panel, column: str, cell: str | float) -> tuple[str, str]:
    if isinstance(cell, str):
        return cell, INK
    found = [
        setting["value"]
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"]["options"] == column
        for setting in override["properties"]
        if setting["id"] == "mappings"
    ]
    return mapped(found[0] if found else (), cell) or (shown(panel, cell), INK)


def mapped(mappings: Sequence[Mapping[str, Any]], value: float) -> tuple[str, str] | None:
    """The words and the colour of a value that a mapping names."""
    for mapping in mappings:
        if option := mapping["options"].get(f"{value:g}"):
            return option["text"], NAMED[option["color"]]
    return None


def draw_state_timeline(panel: Panel, series: Sequence[Series], space: Space) -> Iterator[str]:
    """A row for each series, a bar for each time without a change."""
    left = min(max(svg.text_width(one.name, 11) for one in series) + 14, space.width / 3)
    height = min((space.height - 18) / len(series), 34)
    plot = Plot(left, space.width - left - 6, height * len(series), 1.0, space.span)
    yield from axes(plot, (), ())
    for index, one in enumerate(series):
        y = index * height
        yield svg.text(
            left - 8, y + height / 2 + 4, svg.clipped(one.name, 11, left - 8), 11, fill=INK, text_anchor="end"
        )
        for piece in pieces(one.points, space.span.step):
            for value, run in groupby(piece, key=lambda point: point[1]):
                yield from bar(panel, plot, [time for time, _ in run], value, y, height)


def bar(
    panel: Panel, plot: Plot, times: Sequence[float], value: float, y: float, height: float
) -> Iterator[str]:
    words, colour = mapped(defaults(panel).get("mappings", ()), value) or (shown(panel, value), COLOURS[0])
    start, _ = plot.at(times[0], 0)
    end, _ = plot.at(min(times[-1] + plot.span.step, plot.span.end), 0)
    yield svg.rect(start, y + 3, max(end - start, 1.5), height - 6, fill=colour, fill_opacity=0.8)
    if svg.text_width(words, 11) < end - start - 8:
        yield svg.text((start + end) / 2, y + height / 2 + 4, words, 11, fill="#ffffff", text_anchor="middle")


KINDS: Mapping[str, Callable[[Panel, Sequence[Series], Space], Iterator[str]]] = {
    "stat": draw_stat,
    "timeseries": draw_timeseries,
    "table": draw_table,
    "state-timeline": draw_state_timeline,
}
