"""How many cache lines a request touches: what it costs when its turn comes after others' work.

    .venv/bin/python bench/gateway/lines.py [--python /usr/bin/python3]     # half a minute; needs valgrind

Between two requests of a quiet gateway the processor's caches are lost, to other processes and other virtual
machines. Then a request costs what it fetches from memory again, and less what it computes. valgrind counts
that: the gateway runs under callgrind, whose simulated cache is emptied before each request, so that every
line it touches is missed once. Of the requests the one with the fewest is shown: in the others' time fell
something else too, such as the collection of garbage.

The count does not depend on the machine; it wavers by a tenth, with what else falls into that time. The
kernel's own lines are not in it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from loads import ONE, WARM_UP, Load, run
from proxies import start_gateway, start_source

_REQUESTS = 12
_SINGLE = Load("one request", 1, ONE.events, 0.0)
_CALLGRIND = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes"]
_CACHES = ["--I1=32768,8,64", "--D1=32768,8,64", "--LL=16777216,16,64"]  # the last one never overflows
_START_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the gateway's interpreter")
    python = parser.parse_args().python
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = start_source(stack)
        valgrind = [*_CALLGRIND, *_CACHES, f"--callgrind-out-file={folder}/out"]
        target, _ = start_gateway(stack, source.port, python, under=valgrind, seconds=_START_SECONDS)
        for _ in range(3):
            run(target, WARM_UP)
        for _ in range(_REQUESTS):
            control("--instr=on", target.pid)  # and with it comes an empty cache
            run(target, _SINGLE)
            time.sleep(0.05)  # the connection's end
            control("--instr=off", target.pid)
            control("--dump", target.pid)
        counts = [totals(path.read_text()) for path in folder.glob("out.*")]
    least = min((count for count in counts if count["Ir"]), key=lines)
    code, read, written = least["ILmr"], least["DLmr"], least["DLmw"]
    print(f"cache lines a request: {lines(least):,} (code {code:,}, data {read + written:,}); ", end="")
    print(f"instructions: {least['Ir']:,}")


def control(order: str, pid: int | None) -> None:
    subprocess.run(["callgrind_control", order, str(pid)], check=True, capture_output=True)


def totals(dump: str) -> dict[str, int]:
    """The counts of one dump of callgrind's, by its names of events."""
    names = re.search(r"^events: (.*)$", dump, re.MULTILINE)
    numbers = re.search(r"^totals:(.*)$", dump, re.MULTILINE)
    if names is None or numbers is None:
        sys.exit("callgrind's output is not what it was")
    return dict(zip(names[1].split(), map(int, numbers[1].split()), strict=False))


def lines(count: dict[str, int]) -> int:
    return count["ILmr"] + count["DLmr"] + count["DLmw"]


if __name__ == "__main__":
    main()
