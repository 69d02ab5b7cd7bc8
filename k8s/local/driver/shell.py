"""Running other programs: output to a log file, and on failure its last lines in the error that the user sees."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 15


class DriverError(Exception):
    """A failure with a message for the person at the terminal: what went wrong and what to do about it."""


def run(
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs a command to its end with its output appended to `log`; raises DriverError with the log's tail."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        sink.write(f"$ {' '.join(map(str, command))}\n".encode())
        sink.flush()
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | dict(env or {}), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    if done.returncode != 0:
        raise DriverError(f"{command[0]} failed (exit {done.returncode}). Last lines of {log}:\n{tail(log)}")


def output(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> str:
    """What a command prints on its standard output; raises DriverError with what it wrote to standard error."""
    done = subprocess.run(
        command, env=os.environ | dict(env or {}), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise DriverError(f"{' '.join(map(str, command))} failed (exit {done.returncode}): {done.stderr.strip()}")
    return done.stdout


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])


def debian_packages(commands: Mapping[str, str], log: Path) -> None:
    """Installs the Debian packages of the commands that are missing.

    `commands` maps a command to the package that carries it. Where installing is not possible (no apt-get, not
    root) the error names the packages, so that a person can do it.
    """
    missing = sorted({package for command, package in commands.items() if not find(command)})
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise DriverError(f"These packages are needed: {names}. As root: apt-get install {names}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-q"], log, env=env)
    run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing], log, env=env)


def find(command: str) -> str | None:
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
