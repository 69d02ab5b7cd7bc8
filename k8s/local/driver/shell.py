"""Running other programs: output to a log file, and on failure its last lines in the error that the user
sees.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
            command,
            check=False,
            cwd=cwd,
            env=os.environ | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    if done.returncode != 0:
        raise DriverError(f"{command[0]} failed (exit {done.returncode}). Last lines of {log}:\n{tail(log)}")


def output(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
) -> str:
    """What a command, fed with `text`, prints on its standard output.

    Raises DriverError with what it wrote to its standard error.
    """
    whole = os.environ | dict(env or {})
    done = subprocess.run(
        command, check=False, cwd=cwd, env=whole, input=text or "", capture_output=True, text=True
    )
    if done.returncode != 0:
        raise DriverError(
            f"{' '.join(map(str, command))} failed (exit {done.returncode}): {done.stderr.strip()}"
        )
    return done.stdout


def succeeds(command: Sequence[str | Path]) -> bool:
    """Whether a command exits with 0; what it prints is dropped."""
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(command, check=False, stdin=quiet, stdout=quiet, stderr=quiet).returncode == 0
    except OSError:
        return False


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    if not log.exists():
        return "    (nothing)"
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])


def debian_packages(commands: Mapping[str, str], log: Path) -> None:
    """Installs the Debian packages of the commands that are missing.

    `commands` maps a command to the package that carries it. Where installing is not possible (no apt-get,
    not root) the error names the packages, so that a person can do it.
    """
    missing = sorted({package for command, package in commands.items() if not find(command)})
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise DriverError(f"These packages are needed: {names}. As root: apt-get install {names}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    wait = ["-o", "DPkg::Lock::Timeout=300"]
    run(["apt-get", *wait, "update", "-q"], log, env=env)
    run(["apt-get", *wait, "install", "-q", "-y", "--no-install-recommends", *missing], log, env=env)


def add_no_proxy(addresses: str) -> None:
    """Keeps this process and all that it starts from asking a proxy for these addresses (comma-separated)."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), addresses)))


def find(command: str) -> str | None:
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextmanager
def lock(path: Path, holder: str) -> Iterator[None]:
    """Waits for its turn, and says for whom it waits. The lock ends with the process, however that ends.

    The holder may delete the file; who waited for it then starts again with the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"  … waiting for {holder}", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if is_same(path, handle.fileno()):
                yield
                return


def is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
