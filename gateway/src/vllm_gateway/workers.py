"""`--workers N`: several gateways on one machine, that share its port, and the process that looks after them.

The parent has neither threads nor an event loop, so that it may fork at any time: it holds the ports, starts
the workers and one reporter (`together`: the management port of all), passes signals on, and starts anew
what dies. The workers are gateways like any other; each has a management port of its own on the loopback
interface, which the reporter asks. A worker that loses its parent drains: each watches a pipe whose other end
only the parent has.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TextIO

from vllm_gateway.app import Gateway, Server, serve
from vllm_gateway.settings import BadSettings, Settings
from vllm_gateway.sockets import bind, port_of
from vllm_gateway.together import report

_LOG = logging.getLogger("vllm_gateway.workers")
_LOOPBACK = "127.0.0.1"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_MOST_DOUBLINGS = 30  # a worker may keep dying for days, and 2.0 ** 1024 is no float
_WELL_SECONDS = 60.0  # who lived so long did not die of how it was started
_GRACE_SECONDS = 15.0  # as a pod's terminationGracePeriod has beyond the drain
_SAID = 2  # the exit code of a process that has said on its standard error what is wrong
_OUR_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
# Of a worker that was told to end: by itself, or by the signal, before it had a handler or after.
_ENDS_WELL = (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)


class WorkerServer(Server):
    """A gateway's server that shares its port, says when it listens, and drains when its parent is gone."""

    def __init__(self, gateway: Gateway, lifeline: int, started: Callable[[], None]) -> None:
        super().__init__(gateway, share_port=True)
        self._lifeline = lifeline
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(self._lifeline, self._orphaned)
        self._say_started()

    def _orphaned(self) -> None:
        asyncio.get_running_loop().remove_reader(self._lifeline)
        _LOG.error("the parent process is gone")
        self.drain(0.0)


@dataclass(slots=True)
class Child:
    """A process that is there, or is to be from `due` (monotonic seconds) on."""

    name: str
    work: Callable[[], None]
    is_worker: bool = True
    pid: int = 0
    born: float = 0.0
    due: float = 0.0
    deaths: int = 0

    def wait_after_death(self, now: float) -> float:
        """Seconds until it is started anew: longer each time, unless it lived for a while."""
        self.deaths = 1 if now - self.born > _WELL_SECONDS else self.deaths + 1
        return min(_FIRST_WAIT * 2.0 ** min(self.deaths - 1, _MOST_DOUBLINGS), _LONGEST_WAIT)


class Supervisor:
    """Keeps `children` running until a signal. The others wait until the `first` has come up once: what is
    wrong with the settings is then said once, and ends it all.
    """

    def __init__(self, first: Child, reporter: Child, others: list[Child], patience: float) -> None:
        self._first = first
        self._children = [first, reporter]
        self._others = others
        self._patience = patience
        self._signals: list[int] = []
        self._code = 0
        self._kill_at: float | None = None
        self.lifeline, self._hold = os.pipe()
        self._news, self._tell = os.pipe()

    def started(self) -> None:
        """For the workers: one listens."""
        os.write(self._tell, b"1")

    def run(self) -> int:
        """The exit code: 0 where every worker ended well."""
        with self._watched_signals() as wakeup:
            while self._children:
                self._start_due()
                self._sleep(wakeup)
                self._pass_signals()
                self._bury()
                self._end()
        return self._code

    @property
    def _stopping(self) -> bool:
        return self._kill_at is not None

    @contextlib.contextmanager
    def _watched_signals(self) -> Iterator[int]:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in _OUR_SIGNALS:
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        yield reading

    def _sleep(self, wakeup: int) -> None:
        """Until a signal, news of a worker, or the next thing to do."""
        moments = [child.due for child in self._children if not child.pid]
        moments += [] if self._kill_at is None else [self._kill_at]
        timeout = max(0.0, min(moments) - time.monotonic()) if moments else None
        readable, _, _ = select.select([wakeup, self._news], [], [], timeout)
        for pipe in readable:
            os.read(pipe, 4096)
        if self._news in readable and not self._stopping:
            self._children += self._others
            self._others = []

    def _start_due(self) -> None:
        for child in self._children:
            if not child.pid and not self._stopping and child.due <= time.monotonic():
                self._start(child)

    def _start(self, child: Child) -> None:
        _flush(sys.stdout)
        child.born = time.monotonic()
        try:
            with _held_back_signals():
                child.pid = os.fork()
                if not child.pid:
                    os.close(self._hold)
                    _become(child.work)
        except OSError as error:  # too many processes, or no memory, now: no reason to end those that serve
            wait = child.wait_after_death(child.born)
            child.due = child.born + wait
            fields = {"process": child.name, "error": str(error), "again_in": wait}
            _LOG.error("cannot be started", extra={"fields": fields})
        else:
            _LOG.info("started", extra={"fields": {"process": child.name, "pid": child.pid}})

    def _pass_signals(self) -> None:
        while self._signals:  # one by one: another may come at any moment
            number = self._signals.pop(0)
            if number != signal.SIGCHLD:
                self._stop(number)

    def _stop(self, number: int) -> None:
        """The reporter goes on: it has to say that the workers drain."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._patience
        for child in self._children:
            if child.pid and child.is_worker:
                os.kill(child.pid, number)

    def _bury(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                for child in [child for child in self._children if child.pid == pid]:
                    self._died(child, os.waitstatus_to_exitcode(status))

    def _died(self, child: Child, code: int) -> None:
        fields: dict[str, object] = {"process": child.name, "pid": child.pid, "end": _end(code)}
        child.pid = 0
        if self._stopping:
            if child.is_worker and code not in _ENDS_WELL:
                _LOG.error("did not end well", extra={"fields": fields})
                self._code = self._code or 1
        elif child is self._first and self._others:
            self._code = code if code > 0 else 1
            if code != _SAID:
                _LOG.error("the first worker did not come up", extra={"fields": fields})
            self._stop(signal.SIGTERM)
        else:
            now = time.monotonic()
            wait = child.wait_after_death(now)
            child.due = now + wait
            _LOG.error("died", extra={"fields": fields | {"restart_in": wait}})

    def _end(self) -> None:
        """Once it is to end: forgets who has, kills who will not, and ends the reporter last."""
        if self._kill_at is None:
            return
        self._children = [child for child in self._children if child.pid]
        late = time.monotonic() >= self._kill_at
        if late or not any(child.is_worker for child in self._children):
            for child in self._children:
                os.kill(child.pid, signal.SIGKILL if late else signal.SIGTERM)
            self._kill_at = time.monotonic() + _GRACE_SECONDS


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


@contextlib.contextmanager
def _held_back_signals() -> Iterator[None]:
    """One that comes while a process is made must neither be lost nor meet the parent's handler in it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OUR_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OUR_SIGNALS)


def _flush(stream: TextIO) -> None:
    """Nobody may read it any more, which is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def _become(work: Callable[[], None]) -> NoReturn:
    """Turns a fork into a process of its own, which ends with its work."""
    code = 1
    try:
        os.setsid()  # a terminal's Ctrl+C is for the parent, which passes it on
        signal.set_wakeup_fd(-1)
        for number in _OUR_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OUR_SIGNALS)
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except KeyboardInterrupt:  # the second one, while it ends already
        code = 128 + signal.SIGINT
    except (BadSettings, OSError) as error:
        code = _SAID
        print(f"vllm-gateway: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - it is this process's last words
        traceback.print_exc()
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)
        os._exit(code)


def run_workers(settings: Settings) -> int:
    """Serves with `settings.workers` processes until a signal. The exit code; OSError for a taken port."""
    bind(settings.host, settings.port).close()  # not shared: another gateway's port must not be joined
    front = bind(settings.host, settings.port, shared=True)
    management = bind(settings.host, settings.management_port)
    doors = [bind(_LOOPBACK, 0, shared=True) for _ in range(settings.workers)]
    ports = [port_of(door) for door in doors]
    own = settings.model_copy(update={"port": port_of(front)})

    def let_go(*sockets: socket.socket) -> None:
        """In a fork, which has them all: another gateway may want them while it drains alone."""
        for sock in sockets:
            sock.close()

    def worker(number: int) -> Child:
        def work() -> None:
            let_go(front, management, *doors)
            door = bind(_LOOPBACK, ports[number], shared=True)
            serve(own, door, lambda gateway: WorkerServer(gateway, supervisor.lifeline, supervisor.started))

        return Child(f"worker {number + 1}", work)

    def tell() -> None:
        let_go(front, *doors)
        report(management, ports, supervisor.lifeline)

    reporter = Child("reporter", tell, is_worker=False)
    first, *others = map(worker, range(settings.workers))
    patience = settings.shutdown_delay + settings.drain_timeout + _GRACE_SECONDS
    supervisor = Supervisor(first, reporter, others, patience)
    gc.collect()
    gc.freeze()  # what all processes have in common stays in common
    return supervisor.run()
