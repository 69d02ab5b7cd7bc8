"""The results as a table for docs/benchmarks.md, and as a plot (SVG, no library)."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from loads import BURST, HUNDRED, LONG, MANY, ONE, THREE_HUNDRED, Load, Run, UnaryRun
from proxies import ROOT

_BEGIN, _END = "<!-- bench/gateway: begin -->", "<!-- bench/gateway: end -->"
_DOCS, _PLOT = ROOT / "docs/benchmarks.md", ROOT / "docs/benchmarks-gateway.svg"
_EVENT_COSTS = (HUNDRED, THREE_HUNDRED)
_DRAWS, _TAIL = 1000, 0.05


class Runs(defaultdict[tuple[str, Load], list[Run]]):
    """Streams, by proxy and load."""

    def __init__(self) -> None:
        super().__init__(list)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self))

    def median(self, name: str, load: Load, value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, self[name, load]))

    def cpu(self, name: str, load: Load) -> float:
        """CPU microseconds of one stream of the load, the mean of its rounds.

        A round costs up to twice what another does, as the machine wakes its processors. Between two such
        states a median leaps and a mean does not: the ratio of two proxies' means wavers half as much.
        """
        return statistics.fmean(run.cpu for run in self[name, load]) / load.streams * 1e6

    def drawn(self, chance: random.Random) -> Runs:
        """As many rounds, each drawn from these anew, and the same of every proxy (a bootstrap)."""
        found, rounds = Runs(), {load: len(runs) for (_, load), runs in self.items()}
        picks = {load: chance.choices(range(number), k=number) for load, number in rounds.items()}
        for (name, load), runs in self.items():
            found[name, load] = [runs[pick] for pick in picks[load]]
        return found

    def slope(self, name: str) -> float:
        """Microseconds of one more event."""
        return (self.cpu(name, LONG) - self.cpu(name, ONE)) / (LONG.events - ONE.events)

    def intercept(self, name: str) -> float:
        """Microseconds of a request without its events."""
        return self.cpu(name, ONE) - self.slope(name)


UnaryRuns = dict[str, list[UnaryRun]]


@dataclass(frozen=True)
class Results:
    """All runs; those of `awake` on processors that were kept awake. `python` ran the gateway."""

    rounds: int
    python: str
    runs: Runs = field(default_factory=Runs)
    awake: Runs = field(default_factory=Runs)
    unary: UnaryRuns = field(default_factory=lambda: defaultdict(list))


def tables(results: Results) -> str:
    shown = [_cost_table(results.runs, "CPU of the proxy")]
    shown += [_cost_table(results.awake, "CPU of the proxy, processors kept awake")]
    if results.unary:
        shown += [_latency_table(results), _many_table(results)]
    return "\n".join((_when(results), *shown))


def _when(results: Results) -> str:
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    build = "import platform, sys; print(*platform.python_build(), platform.python_version(), sep='|')"
    number, built, version = subprocess.check_output([results.python, "-c", build], text=True).split("|")
    machine = f"{os.cpu_count()} cores, Python {version.strip()} ({number}, {built}), {system}"
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    rounds = f"{results.rounds} rounds" if results.rounds > 1 else "one round"
    return f"{machine}, {day}; {rounds}{_more(results)}; load average at the end {os.getloadavg()[0]:.1f}.\n"


def _more(results: Results) -> str:
    """How many rounds the loads of the cost have, where they have more."""
    counts = [
        sorted({len(runs) for (_, load), runs in shown.items() if load in loads})
        for shown in (results.runs, results.awake)
        for loads in ((ONE, LONG), _EVENT_COSTS)
    ]
    if max(map(max, counts)) == results.rounds:
        return ""
    slope, events, slope_awake, events_awake = (str(found[-1]) for found in counts)
    return (
        f", of slope and intercept {slope} (awake {slope_awake}), of 100 and 300 × 100 {events} "  # noqa: RUF001
        f"(awake {events_awake}); CPU is the mean of the rounds, all else their median; in brackets where "
        "nine in ten ratios lie if the rounds are drawn again"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join([_row(head), _row("---" for _ in head), *map(_row, rows)]) + "\n"


def _cost_table(results: Runs, title: str) -> str:
    """CPU: slope, intercept, and per event at 100 and 300 streams, each with its ratio to the first row's."""
    names = [name for name in results.names() if name != "direct"]
    draws = [results.drawn(random.Random(number)) for number in range(_DRAWS)]

    def cell(name: str, cost: Callable[[Runs, str], float]) -> str:
        return f"{cost(results, name):.1f} µs ({_ratio(results, draws, cost, name, names[0])})"

    def row(name: str) -> list[str]:
        per_event = [cell(name, partial(_per_event, load)) for load in _EVENT_COSTS]
        request = f"{results.intercept(name):.0f} µs"
        return [name, cell(name, Runs.slope), request, *per_event, _completed(results, name)]

    head = [title, "per event (slope)", "per request (intercept)"]
    loads = [f"per event, {load.streams} × {load.events}" for load in _EVENT_COSTS]  # noqa: RUF001
    return _table([*head, *loads, "streams complete"], map(row, names))


def _per_event(load: Load, runs: Runs, name: str) -> float:
    return runs.cpu(name, load) / load.events


def _ratio(results: Runs, draws: list[Runs], cost: Callable[[Runs, str], float], name: str, base: str) -> str:
    """The cost over that of `base`, and within which bounds it lies in nine of ten draws."""

    def over(runs: Runs) -> float:
        return cost(runs, name) / cost(runs, base)

    shown, again = f"{over(results):.2f} ×", sorted(map(over, draws))  # noqa: RUF001
    low, high = (f"{again[int(share * len(again))]:.2f}" for share in (_TAIL, 1 - _TAIL))
    return shown if low == high else f"{shown}; {low}–{high}"  # noqa: RUF001


def _completed(results: Runs, name: str) -> str:
    loads = [(load, run) for (who, load), runs in results.items() if who == name for run in runs]
    return f"{sum(run.complete for _, run in loads):,} of {sum(load.streams for load, _ in loads):,}"


def _latency_table(results: Results) -> str:
    """Added to what the same load has without a proxy, in the same run, which the last row shows."""

    def added(name: str, load: Load, value: Callable[[Run], float]) -> str:
        seconds = results.runs.median(name, load, value)
        if name != "direct":
            seconds -= results.runs.median("direct", load, value)
        return f"{seconds * 1e3:.1f} ms"

    def row(name: str) -> list[str]:
        first = [
            added(name, load, value)
            for load in (THREE_HUNDRED, BURST)
            for value in (lambda run: run.first_p50, lambda run: run.first_p99)
        ]
        label = "direct: in all" if name == "direct" else name
        return [label, *first, added(name, THREE_HUNDRED, lambda run: run.gap_p99)]

    spread, burst = "first event, 300 over a second", "300 at once"
    head = ["added latency", f"{spread}: p50", "p99", f"{burst}: p50", "p99", "gap between events: p99"]
    return _table(head, map(row, results.runs.names()))


def _many_table(results: Results) -> str:
    """1,000 streams, whose memory shows in the first round only: later ones use again what is there."""

    def row(name: str) -> list[str]:
        first = results.runs[name, MANY][0]
        complete = sum(run.complete for run in results.runs[name, MANY])
        unary = results.unary[name]
        per_second = statistics.median(run.per_second for run in unary)
        each = statistics.median(run.cpu_each for run in unary) * 1e6
        proxied = name != "direct"
        return [
            name,
            f"{complete:,} of {MANY.streams * results.rounds:,}",
            f"{first.memory / MANY.streams / 1000:.1f} kB" if proxied else "",
            f"{results.runs.cpu(name, MANY) / MANY.events:.1f} µs" if proxied else "",
            f"{per_second:,.0f}/s",
            f"{each:.0f} µs" if proxied else "",
        ]

    head = ["1,000 streams, an event per 100 ms", "streams complete", "memory per stream", "CPU per event"]
    return _table([*head, "unary requests, 32 connections", "CPU of one"], map(row, results.runs.names()))


def write_docs(results: Results) -> None:
    """Replaces what is between the markers, and the plot."""
    before, _, rest = _DOCS.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _DOCS.write_text(f"{before}{_BEGIN}\n{tables(results)}\n{_END}{after}")
    _PLOT.write_text(plot(results.runs))


def plot(runs: Runs) -> str:
    """CPU of a stream over its events, a line for each proxy."""
    names = [name for name in runs.names() if name != "direct"]
    loads = (ONE, HUNDRED, LONG)
    top = max(runs.cpu(name, LONG) for name in names) / 1000
    width, height, left, bottom = 640, 360, 60, 40
    right_margin = 170

    def at(events: float, milliseconds: float) -> str:
        x = left + events / LONG.events * (width - left - right_margin)
        return f"{x:.1f},{height - bottom - milliseconds / top * (height - bottom - 30):.1f}"

    colours = ("#7f7f7f", "#d95f02", "#1b6ca8", "#4aa564", "#7570b3")
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">CPU of the proxy for one stream, milliseconds</text>',
        f'<path d="M{at(0, top)} L{at(0, 0)} L{at(LONG.events, 0)}" fill="none" stroke="#333"/>',
    ]
    for events in (0, 100, 200, 300, 400, 500):
        x, y = at(events, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{events}</text>')
    parts.append(f'<text x="{left + 205}" y="{height - 4}" text-anchor="middle">events</text>')
    for step in range(1, 5):
        x, y = at(0, top * step / 4).split(",")
        parts.append(f'<text x="{float(x) - 6:.1f}" y="{y}" text-anchor="end">{top * step / 4:.1f}</text>')
    ends = sorted(((runs.cpu(name, LONG) / 1000, name) for name in names), reverse=True)
    label_y = 0.0
    for (cost, name), colour in zip(ends, colours, strict=False):
        points = " ".join(at(load.events, runs.cpu(name, load) / 1000) for load in loads)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end_x, end_y = map(float, at(LONG.events, cost).split(","))
        label_y = max(end_y + 4, label_y + 15)
        parts.append(f'<text x="{end_x + 6:.1f}" y="{label_y:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
