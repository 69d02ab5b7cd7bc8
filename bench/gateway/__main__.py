"""What relaying one event costs: this gateway beside nginx, in one run, on the same upstream and load.

    .venv/bin/python bench/gateway [--streams 100] [--events 100] [--interval-ms 10] [--rounds 3]

Four processes on the loopback interface: a source of streams, the proxy that is measured, and callers that
count events. The figure is the proxy's CPU time (on-CPU nanoseconds of all its threads, from
/proc/<pid>/task/*/schedstat) over the events that it relayed, so a busy machine disturbs it less than it
would a latency. Proxies take turns, round by round. nginx is taken from PATH or from $NGINX_BINARY.

Read the ratio, not the microseconds: those belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPENAI = "/v1/chat/completions"
NGINX_CONF = """\
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_timeout 75; keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Target:
    name: str
    pid: int
    port: int
    path: str = OPENAI


@dataclass(frozen=True)
class Result:
    microseconds_per_event: float
    complete: int
    first_event_p50: float
    first_event_p99: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(pid: int) -> float:
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


@contextmanager
def process(*command: str | Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_for_port(port: int) -> None:
    until = time.monotonic() + 15
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}")


def start_nginx(stack: ExitStack, binary: str, upstream: int) -> Target:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    port = free_port()
    conf = Path(folder) / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, upstream=upstream, port=port))
    running = stack.enter_context(process(binary, "-c", conf, "-p", folder))
    wait_for_port(port)
    return Target("nginx", running.pid, port)


def start_gateway(stack: ExitStack, upstream: int) -> Target:
    port, management = free_port(), free_port()
    environment = {"VLLM_URL": f"http://127.0.0.1:{upstream}", "HOST": "127.0.0.1"}
    ports = {"PORT": str(port), "MANAGEMENT_PORT": str(management)}
    command = (sys.executable, "-m", "vllm_gateway")
    running = stack.enter_context(process(*command, **environment, **ports))
    wait_for_port(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        if json.load(answer)["status"] != "ok":
            sys.exit("the gateway does not see the upstream")
    return Target("gateway", running.pid, port)


def measure(target: Target, streams: int, events: int, spread: float) -> Result:
    before = cpu_seconds(target.pid)
    command = [
        sys.executable,
        str(HERE / "callers.py"),
        str(target.port),
        target.path,
        str(streams),
        str(spread),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spent = cpu_seconds(target.pid) - before
    report = json.loads(output)
    return Result(
        spent / (streams * events) * 1e6,
        report["complete"],
        report["first_p50"] * 1e3,
        report["first_p99"] * 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--interval-ms", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spread", type=float, default=0.5, help="seconds over which the streams begin")
    options = parser.parse_args()
    with ExitStack() as stack:
        upstream = free_port()
        source = (sys.executable, HERE / "source.py", str(upstream))
        stack.enter_context(process(*source, str(options.events), str(options.interval_ms / 1000)))
        wait_for_port(upstream)
        targets = [start_gateway(stack, upstream)]
        targets.append(Target("gateway /chat/stream", targets[0].pid, targets[0].port, "/chat/stream"))
        nginx = os.environ.get("NGINX_BINARY") or shutil.which("nginx")
        if nginx is None:
            print("nginx not found (Debian: apt-get install nginx-light): no ratio in this run")
        else:
            targets.insert(0, start_nginx(stack, nginx, upstream))
        report(targets, options)


def report(targets: list[Target], options: argparse.Namespace) -> None:
    results: dict[str, list[Result]] = {target.name: [] for target in targets}
    for target in targets:
        measure(target, 10, options.events, 0)  # warm-up: connections, caches
    for _ in range(options.rounds):
        for target in targets:
            results[target.name].append(measure(target, options.streams, options.events, options.spread))
    shape = f"{options.streams} streams of {options.events} events at {options.interval_ms:g} ms"
    print(f"{shape}, median of {options.rounds} rounds; load average {os.getloadavg()[0]:.1f}\n")
    print(
        "| proxy | µs CPU per event | ratio | complete | first event p50 | p99 |\n|---|---|---|---|---|---|"
    )
    base = None
    total = options.rounds * options.streams
    for name, rounds in results.items():
        cost = statistics.median(item.microseconds_per_event for item in rounds)
        base = base or cost
        complete = sum(item.complete for item in rounds)
        p50 = statistics.median(item.first_event_p50 for item in rounds)
        p99 = statistics.median(item.first_event_p99 for item in rounds)
        shares = f"{cost:.1f} | {cost / base:.2f} | {complete}/{total}"
        print(f"| {name} | {shares} | {p50:.1f} ms | {p99:.1f} ms |")


if __name__ == "__main__":
    main()
