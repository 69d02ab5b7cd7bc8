"""`--workers N`: several processes that are one gateway to whoever calls, watches or stops it.

Real processes. Proves: all workers serve; metrics and /load on the one management port are their sum, and
counters do not fall when a worker dies; one that is killed is started anew, with a line in the log, while the
others go on; /readyz is 200 only while all are ready; SIGTERM lets running streams end and leaves no process;
so does Ctrl+C, and at whatever moment of the start it comes, it ends all quietly; Ctrl+C twice does not wait;
workers whose parent is killed drain by themselves, and hold no port meanwhile that another gateway wants; a
taken port, also one that another such gateway shares, and settings that no worker can use are one line and
exit code 2; a first worker that is killed is said; workers that keep dying and forks that fail end no
gateway; no signal is lost among others. The sums: test_together.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import engine as fake
import pytest
from engine import DONE, ROLE, FakeEngine, token
from gateway_process import PYTHON_SECONDS, Process, answers, running_process, started_process
from http_caller import Caller, ask, get, until
from own_port import OwnPort
from prometheus_client.parser import text_string_to_metric_families

from vllm_gateway.workers import Child, Supervisor

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PATH = "/v1/chat/completions"
TWO: dict[str, Any] = {"ready": ":/readyz", "workers": 2, "shutdownDelay": "300ms", "drainTimeout": "20s"}
START = {name: value for name, value in TWO.items() if name != "ready"}
NAMES = ("worker 1", "reporter")
COMMAND = [sys.executable, "-m", "vllm_gateway", "--vllm-url", "http://127.0.0.1:1", "--workers", "2"]
ENVIRONMENT = {**os.environ, "VLLM_URL": "", "CONFIG_FILE": ""}


class Held:
    """An engine's script: streams with the id `held` end only when they are let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def __call__(self, reply: fake.Reply) -> None:
        await reply.head()
        await reply.chunk(ROLE + token("a"))
        if reply.request.headers["x-request-id"] == "held":
            await self.let_go.wait()
        await reply.chunk(token("b") + DONE)
        await reply.end()


async def begin(gateway: Process) -> Caller:
    """A held stream, of which the first tokens are here."""
    caller = await Caller.connect(gateway.port)
    caller.send(PATH, CHAT, headers={"x-request-id": "held"})
    await caller.head()
    await caller.chunk()
    return caller


async def begin_and_kill_the_parent(gateway: Process) -> Caller:
    """A stream whose workers drain alone: no port is open to callers any more."""
    caller = await begin(gateway)
    gateway.signal(signal.SIGKILL)
    await gateway.ended()
    await until(lambda: refused(gateway.port))
    return caller


async def ends_well(caller: Caller) -> bool:
    """False where the connection breaks. Leaves."""
    async with caller:
        try:
            return b"".join(await caller.chunks()) == token("b") + DONE
        except (asyncio.IncompleteReadError, ConnectionError):
            return False


def pids(gateway: Process, name: str) -> list[int]:
    """Of the processes with this name, the oldest first."""
    return [int(line["pid"]) for line in gateway.lines("started") if line["process"] == name]


def all_gone(gateway: Process) -> bool:
    return not any(Path(f"/proc/{line['pid']}").exists() for line in gateway.lines("started"))


async def metric(gateway: Process, name: str, **labels: str) -> float:
    text = (await get(gateway.management, "/metrics")).body.decode()
    samples = (item for family in text_string_to_metric_families(text) for item in family.samples)
    return sum(
        s.value for s in samples if s.name == f"vllm_gateway_{name}" and labels.items() <= s.labels.items()
    )


async def counted(gateway: Process, requests: int) -> None:
    """Until the metrics have all of these; each process counts what has ended a moment later."""

    async def all_of_them() -> bool:
        return await metric(gateway, "requests_total", route=PATH, code="200") == requests

    await until(all_of_them)


async def ready(gateway: Process) -> bool:
    return (await get(gateway.management, "/readyz")).status == 200


async def test_all_serve_all_is_added_up_and_one_that_is_killed_comes_back(tmp_path: Path) -> None:
    script = Held()
    async with FakeEngine(script) as engine, running_process(tmp_path, engine, **TWO) as gateway:
        for _ in range(16):
            assert (await ask(gateway.port, PATH, CHAT)).body.endswith(DONE)
        await counted(gateway, 16)
        assert await metric(gateway, "time_to_first_token_seconds_count") == 16
        callers = [await begin(gateway) for _ in range(32)]
        load = (await get(gateway.management, "/load")).json()
        assert load["models"]["m"]["in_flight"] == 32
        assert list(load["models"]["m"]["endpoints"].values()) == [32]
        assert await metric(gateway, "in_flight", model="m") == 32
        assert await metric(gateway, "endpoints", model="m") == 1

        (killed,) = pids(gateway, "worker 1")
        os.kill(killed, signal.SIGKILL)
        await until(lambda: len(pids(gateway, "worker 1")) == 2, 10)
        (died,) = gateway.lines("died")
        assert (died["process"], died["pid"], died["end"]) == ("worker 1", killed, "SIGKILL")
        assert died["restart_in"] == 0.5
        assert await metric(gateway, "requests_total", route=PATH, code="200") == 16
        await until(lambda: ready(gateway), 20)

        script.let_go.set()
        well = sum([await ends_well(caller) for caller in callers])
        assert 0 < well < 32
        for _ in range(8):
            assert (await ask(gateway.port, PATH, CHAT)).body.endswith(DONE)
        await counted(gateway, 16 + well + 8)

        os.kill(pids(gateway, "reporter")[0], signal.SIGKILL)
        await until(lambda: len(pids(gateway, "reporter")) == 2, 10)
        assert await ready(gateway)  # who asked meanwhile has waited
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_running_stream_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    script = Held()
    async with FakeEngine(script) as engine, running_process(tmp_path, engine, **TWO) as gateway:
        callers = [await begin(gateway) for _ in range(8)]
        gateway.signal(number)
        await until(lambda: not_ready(gateway))
        answer = await get(gateway.management, "/readyz")
        assert answer.body == b"worker 1: draining; worker 2: draining\n"
        assert (await get(gateway.management, "/livez")).status == 200
        assert (await get(gateway.management, "/load")).json()["draining"] is True
        await until(lambda: refused(gateway.port))
        script.let_go.set()
        assert all([await ends_well(caller) for caller in callers])
        assert await gateway.ended() == 0
        assert all_gone(gateway)
        assert gateway.lines("did not end well") == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("after", [0.0, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("begun", ["worker 1", "worker 2"])
async def test_ctrl_c_during_the_start_ends_all_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], begun: str, after: float
) -> None:
    async with FakeEngine() as engine, started_process(tmp_path, engine, **START) as gateway:
        await until(lambda: bool(pids(gateway, begun)), PYTHON_SECONDS)
        await asyncio.sleep(after)
        gateway.ctrl_c()
        assert await gateway.ended() == 0
        assert all_gone(gateway)
        assert gateway.lines("did not end well") == []
    assert capfd.readouterr().err == ""


async def test_ctrl_c_before_anything_is_started_is_quiet(tmp_path: Path) -> None:
    """While the settings are read: a pipe holds the process up in the middle of it."""
    config = tmp_path / "pipe"
    os.mkfifo(config)
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config-file", str(config), stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    pipe = os.open(config, os.O_RDWR)
    os.write(pipe, b"# the settings\n")
    await until(lambda: is_read(pipe) and sleeps(process.pid), PYTHON_SECONDS)
    process.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(process.communicate(), 20)
    os.close(pipe)
    assert (process.returncode, said) == (128 + signal.SIGINT, b"")


def is_read(pipe: int) -> bool:
    """Whether all that was written into it has been read."""
    left = fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(left, sys.byteorder) == 0


def sleeps(pid: int) -> bool:
    """Whether a process waits in a system call, here for more of the pipe."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


async def not_ready(gateway: Process) -> bool:
    return not await ready(gateway)


async def refused(port: int) -> bool:
    try:
        async with await Caller.connect(port):
            return False
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it came just as the listener closed: the next one must be refused
        return False


async def test_ctrl_c_twice_does_not_wait(tmp_path: Path) -> None:
    async with FakeEngine(Held()) as engine, running_process(tmp_path, engine, **TWO) as gateway:
        caller = await begin(gateway)
        gateway.signal(signal.SIGINT)
        await until(lambda: refused(gateway.port))
        assert gateway.process.returncode is None
        gateway.signal(signal.SIGINT)
        await gateway.ended()
        assert all_gone(gateway)
        assert not await ends_well(caller)


async def test_workers_whose_parent_is_killed_drain(tmp_path: Path) -> None:
    script = Held()
    async with FakeEngine(script) as engine, running_process(tmp_path, engine, **TWO) as gateway:
        caller = await begin_and_kill_the_parent(gateway)
        script.let_go.set()
        assert await ends_well(caller)
        await until(lambda: all_gone(gateway), 10)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("flag", ["--port", "--management-port"])
def test_a_taken_port_is_one_line(flag: str) -> None:
    own = {"--port": OwnPort(), "--management-port": OwnPort()}
    ports = {name: str(port.number) for name, port in own.items()}
    with socket.create_server(("127.0.0.1", int(ports[flag]))):
        ended = run("--host", "127.0.0.1", *(part for pair in ports.items() for part in pair))
    assert ended.returncode == 2
    assert ended.stderr == f"vllm-gateway: cannot listen on 127.0.0.1:{ports[flag]}: Address already in use\n"


async def test_a_second_gateway_does_not_join_the_port_of_the_first(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running_process(tmp_path, engine, **TWO) as gateway:
        own = OwnPort()
        other = ("--host", "127.0.0.1", "--port", str(gateway.port), "--management-port", str(own.number))
        ended = await asyncio.to_thread(run, *other)
        assert ended.returncode == 2
        assert "Address already in use" in ended.stderr


def test_what_is_wrong_with_the_settings_is_said_once(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tls": {"certFile": "/nowhere", "keyFile": "/nowhere"}}))
    own = OwnPort(), OwnPort()
    ports = ("--port", str(own[0].number), "--management-port", str(own[1].number))
    ended = run("--host", "127.0.0.1", "--config-file", str(config), *ports)
    assert ended.returncode == 2
    assert ended.stderr.count("vllm-gateway: tls: /nowhere") == 1
    assert "Traceback" not in ended.stderr


def test_a_child_that_keeps_dying_is_started_ever_more_slowly() -> None:
    child = Child("worker 1", lambda: None)
    waits = [child.wait_after_death(1.0) for _ in range(9)]
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert {child.wait_after_death(1.0) for _ in range(3000)} == {30}  # for a day
    assert child.wait_after_death(100.0) == 0.5  # it had lived for a while


async def test_a_first_worker_that_is_killed_while_it_starts_is_said(tmp_path: Path) -> None:
    """By the kernel, for its memory, say: it has no last words, and a bare exit code 1 helps nobody."""
    engine = FakeEngine()
    with socket.create_server(("127.0.0.1", engine.port)):  # never answers: the start waits for it
        async with started_process(tmp_path, engine, **START) as gateway:
            await until(lambda: bool(pids(gateway, "worker 1")), PYTHON_SECONDS)
            os.kill(pids(gateway, "worker 1")[0], signal.SIGKILL)
            assert await gateway.ended() == 1
            (said,) = gateway.lines("the first worker did not come up")
            assert (said["process"], said["end"]) == ("worker 1", "SIGKILL")
            assert all_gone(gateway)


async def test_another_gateway_may_have_the_ports_while_workers_drain_without_their_parent(
    tmp_path: Path,
) -> None:
    """A service manager that starts it anew at once must not fail until the last old stream has ended."""
    script = Held()
    async with FakeEngine(script) as engine, running_process(tmp_path, engine, **TWO) as gateway:
        caller = await begin_and_kill_the_parent(gateway)
        again = tmp_path / "again"
        again.mkdir()
        ports: dict[str, Any] = {"port": gateway.port, "managementPort": gateway.management}
        async with started_process(again, engine, **START, **ports):
            await until(lambda: answers(gateway.management, "/readyz"), PYTHON_SECONDS)
            assert await metric(gateway, "requests_total") == 0
            script.let_go.set()
            assert await ends_well(caller)
            await until(lambda: all_gone(gateway), 10)
            assert (await ask(gateway.port, PATH, CHAT)).body.endswith(DONE)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    """Of children that are not started."""
    worker, reporter = (Child(name, lambda: None, is_worker=name == "worker 1") for name in NAMES)
    made = Supervisor(worker, reporter, [], 1.0)
    yield made
    for pipe in (made.lifeline, made._hold, made._news, made._tell):
        os.close(pipe)


def test_a_fork_that_fails_ends_no_gateway(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many processes, for a moment: the workers that are there serve on."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    before = time.monotonic()
    supervisor._start_due()
    for child in supervisor._children:
        assert child.pid == 0
        assert child.due >= before + 0.5
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert "cannot be started" in caplog.messages


def test_no_signal_is_lost_that_comes_while_others_are_passed_on(supervisor: Supervisor) -> None:
    class Signals(list[int]):
        """One more comes as soon as one has been looked at."""

        late = True

        def _another(self) -> None:
            if self.late:
                self.late = False
                self.append(signal.SIGTERM)

        def __iter__(self) -> Iterator[int]:
            yield from super().__iter__()
            self._another()

        def pop(self, index: SupportsIndex = -1) -> int:
            found = super().pop(index)
            self._another()
            return found

    supervisor._signals = Signals([signal.SIGCHLD])
    supervisor._pass_signals()
    assert supervisor._stopping
