"""Long-running programs, ended only by an identity that was written down before they ran.

A process id alone is no identity: ids are used again. The id, its start time and the boot it belongs to are
one, and the process writes them itself before it becomes the program, so that no kill of the driver, at any
moment, leaves a program behind that nothing knows about.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shell import DriverError, tail

STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
ANNOUNCE = (
    'cd / && read -r boot < /proc/sys/kernel/random/boot_id && start=$(cut -d " " -f 22 "/proc/$$/stat") && '
    'echo "$$ $start $boot" > "$0" && exec "$@"'
)


@dataclass(frozen=True)
class Identity:
    """A process for good: `start` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    pid: int
    start: int
    boot: str

    @classmethod
    def parse(cls, text: str) -> Identity | None:
        """Reads what ANNOUNCE wrote; None for anything else, such as a line cut short."""
        match text.split():
            case [pid, start, boot] if pid.isdecimal() and start.isdecimal() and text.endswith("\n"):
                return cls(int(pid), int(start), boot)
            case _:
                return None

    def is_alive(self, proc: Path = Path("/proc")) -> bool:
        try:
            boot = boot_id(proc)
            state, start = stat_fields((proc / str(self.pid) / "stat").read_text())
        except (OSError, ValueError):
            return False
        return (start, boot) == (self.start, self.boot) and state not in "ZX"


def boot_id(proc: Path = Path("/proc")) -> str:
    """Names this boot of the machine."""
    return (proc / "sys/kernel/random/boot_id").read_text().strip()


def stat_fields(stat: str) -> tuple[str, int]:
    """State and start time of a /proc/PID/stat line; the command's name before them may hold spaces."""
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20:
        raise ValueError(f"not a stat line: {stat!r}")
    return fields[0], int(fields[19])


def command_line(pid: int) -> list[str]:
    """The arguments that a process was started with; empty when it is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Supervisor:
    """Starts, finds and ends named programs; their identities lie in `folder`, their output in `logs`."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder = folder
        self._logs = logs

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("*") if path.is_file())

    def find(self, name: str) -> Identity | None:
        """The live process of that name, if there is one."""
        try:
            identity = Identity.parse((self._folder / name).read_text())
        except OSError:
            return None
        return identity if identity and identity.is_alive() else None

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Starts a program in a session of its own, with its output appended to its log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        record = self._folder / name
        record.unlink(missing_ok=True)
        with self.log(name).open("ab") as sink:
            spawn(["/bin/sh", "-c", ANNOUNCE, str(record), *map(str, command)], sink.fileno())
        deadline = time.monotonic() + STOP_SECONDS
        while not record.exists() or Identity.parse(record.read_text()) is None:
            if time.monotonic() > deadline:
                raise DriverError(f"{name} did not start. {self._last_words(name)}")
            time.sleep(POLL_SECONDS / 10)

    def ensure(self, name: str, command: Sequence[str | Path], *, restart: bool = False) -> bool:
        """Leaves a program alone if it runs with these arguments, else (re)starts it; True if it was
        started.
        """
        running = self.find(name)
        if running and not restart and command_line(running.pid) == [str(word) for word in command]:
            return False
        self.stop(name)
        self.start(name, command)
        return True

    def stop(self, name: str, seconds: float = STOP_SECONDS) -> None:
        """Ends a program: asked first, then killed. No other process than the recorded one is touched."""
        identity = self.find(name)
        if identity:
            end(identity, seconds)
        (self._folder / name).unlink(missing_ok=True)

    def wait(self, name: str, ready: Callable[[], bool], seconds: float) -> None:
        """Waits until `ready`; raises DriverError with the log's tail if the program ends first or time is
        up.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.find(name):
                raise DriverError(f"{name} ended. {self._last_words(name)}")
            if time.monotonic() > deadline:
                raise DriverError(f"{name} is not ready after {seconds:.0f} s. {self._last_words(name)}")
            time.sleep(POLL_SECONDS)

    def _last_words(self, name: str) -> str:
        return f"Last lines of {self.log(name)}:\n{tail(self.log(name))}"


def spawn(command: Sequence[str], output: int) -> None:
    """Runs a command that outlives the driver: its own session, no input, its output to a descriptor."""
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        actions = [
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        os.posix_spawn(command[0], list(command), os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)


def end(identity: Identity, seconds: float = STOP_SECONDS) -> None:
    """Ends exactly this process. A file descriptor holds on to it, so its id cannot pass to another
    meanwhile.
    """
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        if not identity.is_alive():
            return
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, STOP_SECONDS)):
            signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], patience)[0]:
                return
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
    raise DriverError(f"process {identity.pid} does not end, not even when killed")
