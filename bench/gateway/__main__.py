"""What relaying streams costs: this gateway beside nginx, vllm-router and no proxy at all, in one run.

    make bench                                   # everything, half an hour
    .venv/bin/python bench/gateway --short       # the cost alone, 1 round: two minutes
    .venv/bin/python bench/gateway --write       # and the table and the plot into docs/
    .venv/bin/python bench/gateway --python /usr/bin/python3    # the gateway by another interpreter

The figure is the proxy's CPU time by the kernel's per-process clock, so a busy machine disturbs it less than
it would a latency. Proxies take turns, round by round, each time another one first. Slope and intercept are
the cost of one more event and of a request, from streams of 1 and of 500 events.

The cost is measured twice: on processors that fall asleep between two events, and then find their caches
empty, and on processors that a loop of the lowest priority keeps awake, as a busy node's are. Those that
sleep wake up sooner or later by how busy the machine's other guests are, and a proxy's cost goes up and down
by a half from one round to the next. With nine rounds of 100 or 300 streams and their medians the same code
came out anywhere from 1.14 to 1.50 times nginx; with 24 and their means, from 1.24 to 1.40.

Read the ratios, not the microseconds: those belong to the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import ExitStack

from loads import ALL, HUNDRED, LONG, ONE, THREE_HUNDRED, WARM_UP, Load, run, run_unary
from proxies import Target, awake, start_gateway, start_nginx, start_router, start_source, start_splice
from report import Results, Runs, UnaryRuns, tables, write_docs

# So many times the rounds of the other loads, and a third of it with processors awake, which waver less.
_COST = {ONE: 3, HUNDRED: 9, LONG: 3, THREE_HUNDRED: 9}
_UNARY_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --short")
    parser.add_argument("--short", action="store_true", help="only what CPU time a stream costs")
    parser.add_argument("--only", default="", help="only proxies whose name contains this")
    parser.add_argument("--python", default=sys.executable, help="the gateway's interpreter")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its plot")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.short else 3)
    results = Results(rounds, options.python)
    with ExitStack() as stack:
        source = start_source(stack)
        proxies = start_proxies(stack, source.port, options.python)
        chosen = [proxy for proxy in proxies if options.only in proxy.name]
        for target in chosen:
            run(target, WARM_UP)
        many = dict.fromkeys(_COST, 1) if options.short else _COST
        cost = {load: rounds * times for load, times in many.items()}
        if options.short:
            measure(chosen, cost, results.runs)
        else:
            everything = [*chosen, source]
            measure(everything, dict.fromkeys(ALL, rounds) | cost, results.runs)
            measure_unary(everything, results.unary, rounds)
        with awake():
            measure(chosen, {load: max(rounds, number // 3) for load, number in cost.items()}, results.awake)
    print(tables(results))
    if options.write:
        write_docs(results)


def start_proxies(stack: ExitStack, upstream: int, python: str) -> list[Target]:
    """What is measured, the one that the others are compared with first."""
    found = [*start_nginx(stack, upstream), *start_splice(stack, upstream), *start_router(stack, upstream)]
    return [*found, *start_gateway(stack, upstream, python)]


def measure(chosen: list[Target], loads: Mapping[Load, int], runs: Runs) -> None:
    """So many rounds of each load."""
    for load, rounds in loads.items():
        for number in range(rounds):
            first = number % len(chosen)
            for target in chosen[first:] + chosen[:first]:
                print(f"{load.name}, round {number + 1}: {target.name}", file=sys.stderr)
                runs[target.name, load].append(run(target, load))


def measure_unary(chosen: list[Target], runs: UnaryRuns, rounds: int) -> None:
    for _ in range(rounds):
        for target in chosen:
            runs[target.name].append(run_unary(target, _UNARY_SECONDS))


if __name__ == "__main__":
    main()
