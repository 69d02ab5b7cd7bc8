"""What an operator costs and how fast it is with hundreds of models, on a real control plane with fake nodes.

    make bench-operator                      # makes the cluster, and runs this
    make bench-operator KUBE_API_QPS=500     # with controllers that may do more, into a table of its own
    .venv/bin/python bench/operator [--models 100 500 1000] [--idle-seconds 60] [--write docs/benchmarks.md]

On the cluster that KUBECONFIG names. The operator runs as its own process with its chart's service account;
its CPU time and memory are the kernel's figures, its requests those that the API server counts for that
account. The yardstick is a bare loop that writes the same manifests (`vllm-operator render`) with the same
client and as many requests at once, and waits until their Deployments are rolled out. Read the ratios:
seconds belong to the machine. With --production-stack FOLDER, --kubeai FOLDER or both, those operators run
the same course after ours (see the scripts of these names), and the tables have a column for each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from access import Access, bare_client_bodies, namespace_body
from course import (
    Track,
    bare_lap,
    create_models,
    delete_models,
    edit_models,
    idle,
    restart,
    singles,
)
from figures import Lap, Results, between_markers, bound_table, bounds, lap_table, single_table
from flows import Client
from observer import Observer, exists, is_rolled_out, pod_serves
from programs import BenchError, Program
from subjects import NAMESPACE, Subject, kubeai, production_stack, vllm_fleet

from vllm_operator.cluster import connect
from vllm_operator.errors import ApiError, NotFound
from vllm_operator.kinds import DEPLOYMENTS, PODS, SERVICES, Kind
from vllm_operator.settings import Settings

BARE = Client("bare-loop", NAMESPACE, "bench-bare-loop")
ROLE = "edit"  # Kubernetes' own; ours may not make Pods
RESTART_SECONDS = 10  # in which a new process may write, if it is going to
Options = argparse.Namespace


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, nargs="+", default=[100, 500, 1000], help="one lap each")
    parser.add_argument("--samples", type=int, default=15, help="models made one after the other")
    parser.add_argument("--idle-models", type=int, default=500, help="in which lap idling is measured")
    parser.add_argument("--idle-seconds", type=float, default=60)
    parser.add_argument(
        "--replicas", type=int, default=1, help="of each model; 0: no pods, so many models fit"
    )
    parser.add_argument("--workers", type=int, default=Settings().max_concurrent_reconciles)
    parser.add_argument("--no-edits", action="store_true", help="create and delete only")
    parser.add_argument("--no-bare-loop", action="store_true", help="without the yardstick")
    for peer in ("--production-stack", "--kubeai"):
        parser.add_argument(peer, type=Path, metavar="FOLDER", help="measure that operator too")
    parser.add_argument("--logs", type=Path, help="keep the operator's log there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between its markers")
    return parser.parse_args(argv)


@contextlib.asynccontextmanager
async def track(options: Options, subject: Subject, yardstick: Subject, folder: Path) -> AsyncIterator[Track]:
    """Everything that is needed in the cluster, removed afterwards."""
    async with await connect() as client:
        access = Access(client, folder)
        await access.refuse_if_installed()
        try:
            await access.ensure([namespace_body(NAMESPACE), *yardstick.prerequisites])
            await access.ensure(subject.prerequisites)
            await access.ensure(bare_client_bodies(BARE, ROLE))
            await access.count([subject.client, BARE])
            await served(access, subject.kind)
            kinds = {
                SERVICES: exists,
                DEPLOYMENTS: is_rolled_out,
                PODS: pod_serves,
                subject.kind: subject.is_ready,
            }
            async with Observer(access.cluster, NAMESPACE, kinds) as observer:
                bare = await access.kubeconfig(BARE)
                yield Track(access, observer, options.workers, BARE, bare)
        finally:
            await access.close()


async def served(access: Access, kind: Kind, seconds: float = 30) -> None:
    """A definition is not served at once."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(NotFound):
                await access.cluster.list(kind)
                return
            await asyncio.sleep(0.2)


@dataclass
class Race:
    """One subject on its course; `results` grow as it goes. The bare loop writes the yardstick's children."""

    options: Options
    subject: Subject
    yardstick: Subject
    course: Track
    start: Callable[[], Program]
    results: Results

    async def run(self) -> None:
        try:
            if self.options.samples:
                await self._one_by_one()
            for count in self.options.models:
                await self._compare(count)
                said = f"{self.subject.title}, {count} models: done, load {os.getloadavg()[0]:.1f}"
                print(said, file=sys.stderr)
        except BenchError as error:
            self.results.failed = str(error)

    async def _one_by_one(self) -> None:
        program = self.start()
        try:
            await program.ready()
            self.results.singles = await singles(self.course, self.subject, self.options.samples)
        finally:
            program.stop()

    async def _compare(self, count: int) -> None:
        edits = not self.options.no_edits
        if not self.options.no_bare_loop:
            kinds = self.subject.children
            self.results.bare.append(await bare_lap(self.course, self.yardstick, kinds, count, edits=edits))
        self.results.laps.append(await self._lap(count))

    async def _lap(self, count: int) -> Lap:
        """A fresh process, so that its peak of memory is this lap's."""
        course, subject, program = self.course, self.subject, self.start()
        try:
            await program.ready()
            created = await create_models(course, subject, program, count)
            if count == self.options.idle_models:
                self.results.idle = await idle(course, subject, program, self.options.idle_seconds)
            peak = program.memory_mb()
            if count == max(self.options.models):
                program.stop()
                program = self.start()
                self.results.restart = await restart(course, subject, program, RESTART_SECONDS)
            edited = None if self.options.no_edits else await edit_models(course, subject, program, count)
            deleted = await delete_models(course, subject, program)
            peak = max(peak, program.memory_mb())
            return Lap(count, created, edited, deleted, peak, os.getloadavg()[0])
        finally:
            program.stop()


def peers(options: Options) -> list[Subject]:
    built = ((options.production_stack, production_stack), (options.kubeai, kubeai))
    return [peer(folder.resolve()) for folder, peer in built if folder]


async def run(options: Options, folder: Path) -> list[Results]:
    """Ours, and then the peers, one after the other."""
    ours = vllm_fleet(options.workers, options.replicas)
    return [await run_one(options, one, ours, folder) for one in (ours, *peers(options))]


async def run_one(options: Options, subject: Subject, yardstick: Subject, folder: Path) -> Results:
    async with track(options, subject, yardstick, folder) as course:
        kubeconfig = await course.access.kubeconfig(subject.client)
        results = Results(subject.title, workload=subject.workload.kind)
        race = Race(options, subject, yardstick, course, lambda: subject.start(kubeconfig, folder), results)
        await race.run()
    return results


def report(found: Sequence[Results], options: Options, version: str) -> str:
    """The bounds are of our operator, and stand below its own tables only."""
    day = datetime.datetime.now(datetime.UTC).date()
    qps = os.environ.get("KUBE_API_QPS")
    limit = f"{qps} requests a second" if qps else "their own default limits"
    where = (
        f"{day}, {os.cpu_count()} cores, Python {platform.python_version()}, Kubernetes {version}, "
        f"controller-manager and scheduler with {limit}, {options.workers} requests at once, "
        f"load average {os.getloadavg()[0]:.1f} at the end."
    )
    parts = [f"`{command(sys.argv[1:])}`: {where}", lap_table(*found), single_table(*found)]
    if len(found) == 1 and found[0].bare:
        parts.append(bound_table(bounds(found[0])))
    parts += [f"{one.title} ended early: {one.failed}" for one in found if one.failed]
    return "\n\n".join(part for part in parts if part)


def command(arguments: Sequence[str]) -> str:
    """As it was typed, but for the folders of the machine."""
    return " ".join(["python bench/operator", *("…" if "/" in item else item for item in arguments)])


def variant(beside_peers: bool) -> str:
    """Which of the document's tables a run fills."""
    if beside_peers:
        return ", peers"
    return ", KUBE_API_QPS" if os.environ.get("KUBE_API_QPS") else ""


async def main(options: Options, folder: Path) -> None:
    found = await run(options, folder)
    async with await connect() as client:
        text = report(found, options, await Access(client, folder).version())
    print(text)
    if options.write:
        options.write.write_text(between_markers(options.write.read_text(), text, variant(len(found) > 1)))


if __name__ == "__main__":
    asked = parse()
    with tempfile.TemporaryDirectory() as temporary:
        logs = asked.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(main(asked, logs))
        except (BenchError, ApiError) as error:
            sys.exit(f"bench: {error}")
