"""What the monitoring's tests run: a Prometheus, promtool, and the Prometheus Operator's generator of scrape
configurations with its definitions. Only programs: nothing is installed into the cluster or started here.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import golang
from console import say, step
from paths import BIN, LOGS, cache
from shell import DriverError, find, output, run
from tools import replace

PROGRAMS = ("prometheus", "promtool")
PACKAGE = "prometheus"
LOG = LOGS / "build.log"


def ensure() -> None:
    """Puts them into `.cluster/bin`, the definitions as `monitoring-crds.yaml`."""
    golang.ensure((golang.PROMETHEUS_CONFIG,))
    BIN.mkdir(parents=True, exist_ok=True)
    generator = golang.PROMETHEUS_CONFIG.path()
    replace(BIN / generator.name, generator)
    replace(BIN / "monitoring-crds.yaml", generator.parent / "monitoring-crds.yaml")
    for program in PROGRAMS:
        found = find(program)
        replace(BIN / program, Path(found) if found else debian_program(program))
    say(f"ready in {BIN}")


def debian_program(name: str) -> Path:
    """Of Debian's package, unpacked into the cache: installed, it would start a server on port 9090."""
    folder = cache() / "debian" / PACKAGE
    if not folder.exists():
        unpack(folder)
    return folder / "usr" / "bin" / name


def unpack(folder: Path) -> None:
    if not shutil.which("apt-get"):
        raise DriverError("prometheus and promtool are needed, and this is no Debian: put both on PATH")
    with step(f"fetch Debian's {PACKAGE}"), tempfile.TemporaryDirectory() as work:
        download(Path(work))
        (archive,) = Path(work).glob("*.deb")
        fresh = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        output(["dpkg-deb", "--extract", archive, fresh])
        fresh.rename(folder)


def download(folder: Path) -> None:
    """Into the folder; where the machine has no package lists yet, they are fetched first (as root)."""
    command = ["apt-get", "download", "-q", PACKAGE]
    try:
        run(command, LOG, cwd=folder)
    except DriverError:
        run(["apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-q"], LOG)
        run(command, LOG, cwd=folder)
