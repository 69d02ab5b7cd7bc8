"""What relaying streams costs: this gateway beside nginx, vllm-router and no proxy at all, in one run.

    make bench                                   # everything, 3 rounds: about 8 minutes
    .venv/bin/python bench/gateway --short       # the cost alone, 1 round: half a minute
    .venv/bin/python bench/gateway --write       # and the table and the plot into docs/

The figure is the proxy's CPU time by the kernel's per-process clock, so a busy machine disturbs it less than
it would a latency. Proxies take turns, round by round; each figure is the median of the rounds. Slope and
intercept are the cost of one more event and of a request, from streams of 1 and of 500 events.

Read the ratios, not the microseconds: those belong to the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack

from loads import ALL, HUNDRED, LONG, ONE, THREE_HUNDRED, WARM_UP, run, run_unary
from proxies import Target, start_gateway, start_nginx, start_router, start_source, start_splice
from report import Results, tables, write_docs

_SHORT = (ONE, HUNDRED, LONG, THREE_HUNDRED)
_UNARY_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --short")
    parser.add_argument("--short", action="store_true", help="only what CPU time a stream costs")
    parser.add_argument("--only", default="", help="only proxies whose name contains this")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its plot")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.short else 3)
    with ExitStack() as stack:
        results = measure(targets(stack, options.only, direct=not options.short), rounds, short=options.short)
    print(tables(results))
    if options.write:
        write_docs(results)


def targets(stack: ExitStack, only: str, *, direct: bool) -> list[Target]:
    """What is measured, the one that the others are compared with first."""
    source = start_source(stack)
    found = [*start_nginx(stack, source.port), *start_splice(stack, source.port)]
    found += start_router(stack, source.port)
    found += start_gateway(stack, source.port)
    chosen = [target for target in found if only in target.name]
    return [*chosen, Target("direct", None, source.port)] if direct else chosen


def measure(chosen: list[Target], rounds: int, *, short: bool) -> Results:
    results = Results(rounds, defaultdict(list), defaultdict(list))
    for target in chosen:
        run(target, WARM_UP)
    for load in _SHORT if short else ALL:
        for number in range(rounds):
            for target in chosen:
                print(f"{load.name}, round {number + 1}: {target.name}", file=sys.stderr)
                results.runs[target.name, load].append(run(target, load))
    for _ in range(0 if short else rounds):
        for target in chosen:
            results.unary[target.name].append(run_unary(target, _UNARY_SECONDS))
    return results


if __name__ == "__main__":
    main()
