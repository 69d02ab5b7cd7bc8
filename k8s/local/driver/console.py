"""What the driver says while it works: one line a step, with its elapsed time, and a live line on long ones.

On a terminal the line is redrawn in place; elsewhere (CI, a file) a long step prints a line every 30 seconds,
so that a log never stands still without a reason on it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QUIET_SECONDS = 30.0
REDRAW_SECONDS = 0.5
LINE_LENGTH = 118  # a detail may be the last line of a log, and so of any length


class Step:
    """One step of work. `detail` is what it is doing right now; any thread may set it at any time."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.note = ""
        self._log: Path | None = None
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def follow(self, log: Path) -> None:
        """Shows the last line of a log file as the detail."""
        self._log = log

    def start(self) -> None:
        self._thread.start()

    def finish(self, mark: str) -> None:
        self._stop.set()
        self._thread.join()
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        note = f"  {self.note}" if self.note else ""
        print(f"{clear}  {mark} {self.title} {duration(self.elapsed)}{note}", flush=True)

    def _tick(self) -> None:
        live = sys.stdout.isatty()
        while not self._stop.wait(REDRAW_SECONDS if live else QUIET_SECONDS):
            detail = last_line(self._log) if self._log else self.detail
            text = f"  … {self.title} {duration(self.elapsed)}  {detail}"
            line = text[:LINE_LENGTH]
            print(f"\r\033[K{line}" if live else line, end="" if live else "\n", flush=True)


def last_line(log: Path) -> str:
    """The last line of a file that another process writes to; its last 4 kB are enough to find it."""
    try:
        with log.open("rb") as source:
            source.seek(max(0, log.stat().st_size - 4096))
            return source.read().decode(errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"({seconds:.0f} s)" if seconds >= 1 else f"({seconds:.1f} s)"
    return f"({int(seconds) // 60} min {int(seconds) % 60:02d} s)"


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Announces the work of a `with` block; marks it as done, or as failed if an exception leaves it."""
    work = Step(title)
    work.start()
    try:
        yield work
    except BaseException:
        work.finish("✗")
        raise
    work.finish("✓")


def say(text: str) -> None:
    print(text, flush=True)
