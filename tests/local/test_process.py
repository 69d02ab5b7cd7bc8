"""The driver's processes: it ends exactly those that it started.

- A program's identity is on disk before the program runs, so a kill of the driver leaves nothing unknown
  behind.
- A recorded id that now belongs to another process, or to another boot, ends nobody.
- A program that ignores SIGTERM is killed; one that ended by itself is no error.
- A program that runs with other arguments than wanted is started again, one that runs as wanted is left
  alone.
- A program that ends instead of becoming ready is reported with the last lines of its log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from process import Identity, Supervisor, boot_id, command_line, stat_fields
from shell import DriverError

SLEEP = ["/bin/sleep", "60"]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "pids", tmp_path / "logs")
    yield supervisor
    for name in supervisor.names():
        supervisor.stop(name, seconds=0.1)


def started(programs: Supervisor, name: str, command: list[str]) -> Identity:
    programs.start(name, command)
    found = programs.find(name)
    assert found
    deadline = time.monotonic() + 5
    while command_line(found.pid) != command and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_identity_is_recorded_before_the_program_runs(programs: Supervisor, tmp_path: Path) -> None:
    record = tmp_path / "pids" / "reader"
    identity = started(programs, "reader", ["/bin/sh", "-c", f"cat {record}; sleep 60"])
    programs.wait("reader", lambda: bool(programs.log("reader").read_text()), 5)
    assert Identity.parse(programs.log("reader").read_text()) == identity


def test_a_program_is_the_leader_of_its_own_session(programs: Supervisor) -> None:
    identity = started(programs, "sleep", SLEEP)
    assert os.getsid(identity.pid) == identity.pid != os.getsid(0)


def test_stop_ends_it_and_forgets_it(programs: Supervisor) -> None:
    identity = started(programs, "sleep", SLEEP)
    programs.stop("sleep")
    assert not identity.is_alive()
    assert programs.names() == []
    programs.stop("sleep")


def test_a_program_that_ignores_sigterm_is_killed(programs: Supervisor) -> None:
    programs.start("stubborn", ["/bin/sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done"])
    programs.wait("stubborn", lambda: "set" in programs.log("stubborn").read_text(), 5)
    identity = programs.find("stubborn")
    assert identity
    programs.stop("stubborn", seconds=0.2)
    assert not identity.is_alive()


@pytest.mark.parametrize("field", ["start", "boot"])
def test_a_used_again_id_ends_nobody(programs: Supervisor, tmp_path: Path, field: str) -> None:
    bystander = started(programs, "bystander", SLEEP)
    start = bystander.start - (field == "start")
    boot = "another-boot" if field == "boot" else bystander.boot
    (tmp_path / "pids" / "stale").write_text(f"{bystander.pid} {start} {boot}\n")
    assert programs.find("stale") is None
    programs.stop("stale")
    assert bystander.is_alive()
    assert programs.names() == ["bystander"]


@pytest.mark.parametrize("text", ["", "12", "12 34\n", "12 34 boot", "x 34 boot\n", "12 34 boot more\n"])
def test_a_record_cut_short_is_none(text: str) -> None:
    assert Identity.parse(text) is None


def test_ensure_leaves_alone_what_runs_as_wanted(programs: Supervisor) -> None:
    before = started(programs, "sleep", SLEEP)
    assert not programs.ensure("sleep", SLEEP)
    assert programs.find("sleep") == before


def test_ensure_starts_again_with_other_arguments_or_on_request(programs: Supervisor) -> None:
    before = started(programs, "sleep", SLEEP)
    assert programs.ensure("sleep", ["/bin/sleep", "61"])
    middle = programs.find("sleep")
    assert programs.ensure("sleep", ["/bin/sleep", "61"], restart=True)
    assert len({before, middle, programs.find("sleep")}) == 3


def test_a_program_that_ends_is_reported_with_its_last_words(programs: Supervisor) -> None:
    programs.start("brief", ["/bin/sh", "-c", "echo no such certificate; exit 3"])
    with pytest.raises(DriverError, match=r"(?s)brief ended.*no such certificate"):
        programs.wait("brief", lambda: False, 5)


def test_a_program_that_is_never_ready_is_reported(programs: Supervisor) -> None:
    programs.start("slow", SLEEP)
    with pytest.raises(DriverError, match="slow is not ready after 0 s"):
        programs.wait("slow", lambda: False, 0.2)


def test_stat_line_of_a_command_with_spaces_and_brackets() -> None:
    line = "4 (tmux: (server)) S " + " ".join(str(n) for n in range(4, 53))
    assert stat_fields(line) == ("S", 22)
    with pytest.raises(ValueError, match="not a stat line"):
        stat_fields("4 (x) S 1")


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("b\n")
    for state, alive in (("S", True), ("Z", False)):
        (folder / "stat").write_text(f"7 (x) {state} " + " ".join(str(n) for n in range(4, 53)))
        assert Identity(7, 22, boot_id(tmp_path)).is_alive(tmp_path) is alive
