"""The figures of a run, what was promised of them, and the tables that go into docs/benchmarks.md. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from flows import children_writes, per_model, writes

START, END = "<!-- bench/operator{}: begin -->", "<!-- bench/operator{}: end -->"
CHILDREN_PER_MODEL = 2  # Deployment and Service


@dataclass(frozen=True)
class Spent:
    """Requests of one client; CPU seconds of its process, and of the API server for everything."""

    requests: Counter[str] = field(default_factory=Counter)
    cpu: float = 0.0
    server_cpu: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Seconds until all children exist or are gone, and until all models are ready; and what it cost."""

    children: float
    ready: float
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True)
class Lap:
    """`models` created, edited and deleted at once, by one client."""

    models: int
    created: Phase
    edited: Phase | None
    deleted: Phase
    peak_mb: float = 0.0
    load: float = 0.0  # of the machine, the last minute's average at the end


@dataclass(frozen=True)
class Singles:
    """Seconds, one sample a model, with nothing else going on."""

    to_child: list[float] = field(default_factory=list)
    pod_to_model: list[float] = field(default_factory=list)
    repair: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Idle:
    models: int
    seconds: float
    cpu: float
    writes: int

    @property
    def percent(self) -> float:
        """Of one core."""
        return 100 * self.cpu / self.seconds


@dataclass(frozen=True)
class Restart:
    """A new process in a cluster that is as it shall be."""

    models: int
    ready: float
    cpu: float
    memory_mb: float
    writes: int


@dataclass
class Results:
    """Of one subject; `bare` are the yardstick's laps in the same run, `workload` is what runs a model."""

    title: str
    laps: list[Lap] = field(default_factory=list)
    bare: list[Lap] = field(default_factory=list)
    singles: Singles | None = None
    idle: Idle | None = None
    restart: Restart | None = None
    failed: str = ""
    workload: str = "Deployment"


@dataclass(frozen=True)
class Bound:
    what: str
    measured: str
    holds: bool


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def beside(value: float, yardstick: float | None) -> str:
    """Seconds, with the ratio to the bare loop's where there is one."""
    if not yardstick:
        return f"{value:.1f} s"
    return f"{value:.1f} s ({value / yardstick:.2f} x {yardstick:.1f})"


Measured = Callable[[Lap], float | None]


def lap_table(*subjects: Results) -> str:
    """One column a size and subject; in brackets the ratio to the bare loop's seconds."""
    compared: list[tuple[str, Measured]] = [
        ("all children exist", lambda lap: lap.created.children),
        ("all ready", lambda lap: lap.created.ready),
        ("all edited and ready again", lambda lap: lap.edited.ready if lap.edited else None),
        ("all deleted", lambda lap: lap.deleted.children),
        ("CPU of the API server, create", lambda lap: lap.created.spent.server_cpu),
    ]
    own: list[tuple[str, Callable[[Lap], str]]] = [
        ("CPU of the operator, create", lambda lap: _cpu(lap.created, lap.models)),
        ("CPU of the operator, edit", lambda lap: _cpu(lap.edited, lap.models)),
        ("its peak memory", lambda lap: f"{lap.peak_mb:.0f} MB"),
        ("its requests a model, create", lambda lap: _requests(lap.created, lap.models)),
        ("its requests a model, edit", lambda lap: _requests(lap.edited, lap.models)),
        ("load of the machine at the end", lambda lap: f"{lap.load:.1f}"),
    ]
    rows = [[name, *chain(*(_compared(one, figure) for one in subjects))] for name, figure in compared]
    rows += [[name, *(cell(lap) for one in subjects for lap in one.laps)] for name, cell in own]
    return table(_head(subjects), rows)


def _head(subjects: Sequence[Results]) -> list[str]:
    """The subject's name stands before its columns: once if there is one, else over each."""
    if len(subjects) == 1:
        return [subjects[0].title, *(f"{lap.models:,} models" for lap in subjects[0].laps)]
    return ["", *(f"{one.title}, {lap.models:,} models" for one in subjects for lap in one.laps)]


def _compared(results: Results, figure: Measured) -> Iterator[str]:
    for number, lap in enumerate(results.laps):
        value = figure(lap)
        yardstick = figure(results.bare[number]) if number < len(results.bare) else None
        yield "not measured" if value is None else beside(value, yardstick)


def _cpu(phase: Phase | None, models: int) -> str:
    if phase is None:
        return "not measured"
    return f"{phase.spent.cpu:.1f} s ({1000 * phase.spent.cpu / models:.1f} ms a model)"


def _requests(phase: Phase | None, models: int) -> str:
    """Requests for one model, in all and by kind, the most frequent first."""
    if phase is None:
        return "not measured"
    counts = phase.spent.requests
    parts = [f"{name} {count / models:.2g}" for name, count in counts.most_common() if name != "lease"]
    return f"{per_model(counts, models):.1f}: {', '.join(parts)}" if parts else "none"


def single_table(*subjects: Results) -> str:
    """Everything that is not a lap, one row each and one column a subject."""
    found = [dict(_single_rows(one)) for one in subjects]
    names = dict.fromkeys(chain(*found))
    rows = [[name, *(one.get(name, "not measured") for one in found)] for name in names]
    if len(subjects) == 1:
        return table([subjects[0].title, "figure"], rows)
    return table(["", *(one.title for one in subjects)], rows)


def _single_rows(results: Results) -> Iterator[tuple[str, str]]:
    if results.singles is not None:
        yield "model created → its workload exists", _of(results, results.singles.to_child)
        yield "pod ready → model ready", middle(results.singles.pod_to_model)
        yield "workload deleted → it is back", _of(results, results.singles.repair)
    if (idle := results.idle) is not None:
        said = f"{idle.percent:.2f} % of a core, {idle.writes} writes in {idle.seconds:.0f} s"
        yield f"idle, {idle.models:,} models", said
    if (again := results.restart) is not None:
        said = f"ready after {again.ready:.1f} s, {again.writes} writes, {again.cpu:.1f} s CPU, "
        yield f"restart, {again.models:,} models", said + f"{again.memory_mb:.0f} MB"


def _of(results: Results, samples: Sequence[float]) -> str:
    return f"{results.workload}: {middle(samples)}"


def middle(samples: Sequence[float]) -> str:
    """The median and the worst of some seconds."""
    if not samples:
        return "none"
    return f"{statistics.median(samples):.3f} s (worst of {len(samples)}: {max(samples):.3f} s)"


def bounds(results: Results) -> list[Bound]:
    """What was promised of the operator, beside what was measured in this run."""
    made: list[Bound] = []
    for lap, bare in zip(results.laps, results.bare, strict=False):
        made += _lap_bounds(lap, bare)
    if results.singles is not None:
        made += _single_bounds(results.singles)
    if (idle := results.idle) is not None:
        made.append(Bound("idle: under 1 % of a core", f"{idle.percent:.2f} %", idle.percent < 1))
        made.append(Bound("idle: no write but the Lease's", f"{idle.writes}", idle.writes == 0))
    if (again := results.restart) is not None:
        said = f"{again.models:,} unchanged models after a restart: no write but the Lease's"
        made.append(Bound(said, f"{again.writes}", again.writes == 0))
    return made


def _lap_bounds(lap: Lap, bare: Lap) -> list[Bound]:
    requests, count = lap.created.spent.requests, lap.models
    ratio, children = lap.created.ready / bare.created.ready, lap.created.children
    of_children, rest = children_writes(requests), writes(requests) - children_writes(requests)
    few = of_children <= CHILDREN_PER_MODEL * count and rest <= 3 * count
    named = [
        ("children within 20 ms a model", f"{children:.1f} s", children <= 0.02 * count),
        ("ready within 1.15 x the bare loop", f"{ratio:.2f} x", ratio <= 1.15),
        ("under 200 MB", f"{lap.peak_mb:.0f} MB", lap.peak_mb < 200),
        ("a write a child, three more a model", f"{of_children / count:.2f} + {rest / count:.2f}", few),
    ]
    return [Bound(f"{count:,} models: {what}", measured, holds) for what, measured, holds in named]


def _single_bounds(singles: Singles) -> list[Bound]:
    named = (
        ("Deployment within 0.5 s of its model, median", singles.to_child, 0.5),
        ("model ready within 1 s of its pod, median", singles.pod_to_model, 1.0),
        ("deleted Deployment back within 1 s, median", singles.repair, 1.0),
    )
    middles = ((what, statistics.median(samples), limit) for what, samples, limit in named if samples)
    return [Bound(what, f"{seconds:.3f} s", seconds < limit) for what, seconds, limit in middles]


def bound_table(found: Sequence[Bound]) -> str:
    rows = [[bound.what, bound.measured, "ok" if bound.holds else "missed"] for bound in found]
    return table(["bound", "measured", ""], rows)


def between_markers(document: str, text: str, variant: str = "") -> str:
    """The document with `text` between the variant's markers; ValueError without them."""
    begin, finish = START.format(variant), END.format(variant)
    before, start, rest = document.partition(begin)
    _, end, after = rest.partition(finish)
    if not (start and end):
        raise ValueError(f"no {begin} … {finish} in it")
    return f"{before}{begin}\n\n{text.strip()}\n\n{finish}{after}"
