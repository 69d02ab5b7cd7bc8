"""What is measured: each proxy as a process of its own on the loopback interface, in front of one source."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEY = "sk-bench-0123456789abcdef"
OPENAI = "/v1/chat/completions"
_NGINX_CONF = """\
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr error; worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_timeout 75; keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300;
    }}
  }}
}}
"""
# Everything that a shared gateway has switched on: a key with every limit, so that each is looked at.
_GATEWAY_KEYS = f"""\
keys:
- name: bench
  key: {KEY}
  limits: {{requestsPerMinute: 10000000, tokensPerMinute: 1000000000, concurrency: 100000}}
"""
_GATEWAY_CONFIG = """\
host: 127.0.0.1
port: {port}
managementPort: {management}
backends: [{{url: "http://127.0.0.1:{upstream}"}}]
auth: {{keysFile: {keys}}}
queue: {{maxInFlight: 4096}}
"""


@dataclass(frozen=True)
class Target:
    """Where callers go. `pid` is None where no proxy is in between; `unary` is the API without a stream."""

    name: str
    pid: int | None
    port: int
    path: str = OPENAI
    unary: str = OPENAI


def cpu_seconds(pid: int | None) -> float:
    """CPU time of a process, all its threads, also those that have ended (the kernel's per-process clock)."""
    return (
        0.0 if pid is None else time.clock_gettime((~pid << 3) | 2)
    )  # CPUCLOCK_SCHED: clock_getcpuclockid(3)


def resident_bytes(pid: int | None) -> int:
    if pid is None:
        return 0
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(
    *command: str | Path, log: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (log or Path(os.devnull)).open("wb") as output:
        running = subprocess.Popen(command, stdout=output, env=environment)
        try:
            yield running
        finally:
            running.kill()
            running.wait()


@contextmanager
def awake() -> Iterator[None]:
    """Gives each processor a loop that runs only while nothing else wants to."""
    loop = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(process(sys.executable, "-c", loop))
        yield


def start_source(stack: ExitStack) -> Target:
    port = free_port()
    running = stack.enter_context(process(sys.executable, HERE / "source.py", str(port)))
    _wait_for_port(port, 15)
    return Target("direct", running.pid, port)


def start_nginx(stack: ExitStack, upstream: int) -> list[Target]:
    """nginx from PATH or $NGINX_BINARY; without an access log, keys or limits."""
    binary = os.environ.get("NGINX_BINARY") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        print("nginx not found (Debian: apt-get install nginx-light): no ratios in this run", file=sys.stderr)
        return []
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    port = free_port()
    conf = Path(folder) / "nginx.conf"
    conf.write_text(_NGINX_CONF.format(folder=folder, upstream=upstream, port=port))
    running = stack.enter_context(process(binary, "-c", conf, "-p", folder))
    _wait_for_port(port, 15)
    return [Target("nginx", running.pid, port)]


def start_splice(stack: ExitStack, upstream: int) -> list[Target]:
    port = free_port()
    running = stack.enter_context(process(sys.executable, HERE / "splice.py", str(port), str(upstream)))
    _wait_for_port(port, 15)
    return [Target("uvloop splice", running.pid, port)]


def start_router(stack: ExitStack, upstream: int) -> list[Target]:
    """vllm-router (Rust) as its wheel installs it, in .venv/bench; see `make bench`."""
    binary = ROOT / ".venv/bench/bin/vllm-router"
    if not binary.exists():
        print("vllm-router is not installed (make bench does it): left out", file=sys.stderr)
        return []
    port = free_port()
    arguments = ["--port", str(port), "--prometheus-port", str(free_port()), "--log-level", "error"]
    limits = ["--max-concurrent-requests", "8192", "--queue-size", "8192"]
    worker = ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin"]
    running = stack.enter_context(process(binary, *arguments, *limits, *worker))
    _wait_for_port(port, 60)
    return [Target("vllm-router", running.pid, port)]


def start_gateway(
    stack: ExitStack, upstream: int, python: str, under: Sequence[str] = (), seconds: float = 15.0
) -> list[Target]:
    """This gateway with keys, every limit, metrics, token accounting and its access log, to a file.

    `python` may be another build of the same version: it gets this one's packages. `under` is a command that
    runs it, and may take `seconds` for that.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    port, management = free_port(), free_port()
    keys, config = folder / "keys.yaml", folder / "gateway.yaml"
    keys.write_text(_GATEWAY_KEYS)
    config.write_text(_GATEWAY_CONFIG.format(port=port, management=management, upstream=upstream, keys=keys))
    command: tuple[str | Path, ...] = (*under, python, "-m", "vllm_gateway", "--config-file", config)
    packages = [path for path in sys.path[1:] if not path.startswith(sys.base_prefix)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)}
    running = stack.enter_context(process(*command, log=folder / "access.log", environment=environment))
    _wait_for_port(port, seconds)
    _wait_until(lambda: _health(port) == "ok", seconds, "the gateway does not see the source")
    return [
        Target("gateway /v1", running.pid, port),
        Target("gateway /chat/stream", running.pid, port, "/chat/stream", "/chat"),
    ]


def _health(port: int) -> object:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"x-api-key": KEY})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)["status"]
    except urllib.error.HTTPError:
        return None


def _wait_for_port(port: int, seconds: float) -> None:
    def open_port() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    _wait_until(open_port, seconds, f"nothing listens on port {port}")


def _wait_until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            sys.exit(problem)
        time.sleep(0.05)
