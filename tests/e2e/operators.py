"""Operators that a test runs itself: the real process before the real API server, in namespaces of their own.

Each speaks through a proxy (tests/fakes/api_proxy), so that a test can count what it writes and break its
connection, and each may be killed without harm to the release. The release's own operator must be away
meanwhile, since it serves all namespaces: see `alone`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import cluster
import httpx
import releases
from api_proxy import ApiProxy
from kubernetes.aio import config
from kubernetes.aio.client import Configuration

from vllm_operator.handlers import connection_info, open_session

QUIET_SECONDS = 3  # longer than a status may be held back (vllm_operator.pacing)
QUICK_LEASE = {"durationSeconds": 4, "renewSeconds": 3, "retrySeconds": 0.5}
NOWHERE = {"nodeSelector": {"vllm-fleet.dev/test": "no-such-node"}}
# `python -c` with a release number, as an operator of another version has it.
AS_VERSION = (
    "import vllm_operator as o; o.__version__ = {!r}; from vllm_operator.__main__ import main as m; m()"
)


@contextmanager
def own_namespace() -> Iterator[str]:
    with cluster.lent_namespace(f"faults-{uuid.uuid4().hex[:8]}") as name:
        yield name


@contextmanager
def alone() -> Iterator[None]:
    """Without the release's operator, which is back, and leads, at the end."""
    target, selector = "deployment/vllm-fleet-operator", "app.kubernetes.io/component=operator"
    scale = ("-n", cluster.SYSTEM_NAMESPACE, "scale", target)
    try:
        cluster.kubectl(*scale, "--replicas=0")
        cluster.eventually(
            lambda: not cluster.items("pods", selector, cluster.SYSTEM_NAMESPACE), "its pod is gone", 120
        )
        yield
    finally:
        cluster.kubectl(*scale, "--replicas=1")
        cluster.eventually(releases.operator_leads, "the release's operator leads", 120)


def api_configuration() -> Configuration:
    """What KUBECONFIG says, with its credentials."""
    configuration = Configuration()
    asyncio.run(config.load_kube_config(os.environ["KUBECONFIG"], client_configuration=configuration))
    return configuration


def model(name: str, **spec: Any) -> cluster.Manifest:
    """A model whose pods no node takes: what matters here happens before there are containers."""
    manifest = cluster.example("smollm2.yaml")
    manifest["metadata"]["name"] = name
    manifest["spec"] |= {"servedNames": [name], "scheduling": NOWHERE} | spec
    return manifest


def make_ready(pods: Sequence[str], namespace: str) -> None:
    """Plays the kubelet of pods that no node takes: they run and are ready."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
    status = {"status": {"phase": "Running", "conditions": [ready]}}
    patch = ("--subresource=status", "--type=merge", "-p", json.dumps(status))
    cluster.kubectl("-n", namespace, "patch", "pod", *pods, *patch)


def engine_of(name: str, namespace: str) -> Any:
    deployment = cluster.get("deployment", f"{name}-engine", namespace)
    assert deployment
    return deployment["spec"]["template"]["spec"]["containers"][0]


def pods(namespace: str, number: int) -> list[str]:
    """The names of all engines, once there are so many."""
    found = cluster.items("pods", "app.kubernetes.io/component=engine", namespace)
    return [pod["metadata"]["name"] for pod in found] if len(found) == number else []


def all_ready(namespace: str, number: int) -> bool:
    models = json.loads(cluster.kubectl("-n", namespace, "get", "vllm", "-o", "json"))["items"]
    return [ready_now(model) for model in models] == [True] * number


def ready_now(body: cluster.Manifest) -> bool:
    conditions = body.get("status", {}).get("conditions", [])
    return any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)


@dataclass
class OwnOperator:
    """One replica by the name that its Lease shows. It can be started again after it has ended."""

    folder: Path
    name: str
    proxy: ApiProxy
    settings: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    _port: int = 0

    @classmethod
    def through_proxy(cls, stack: ExitStack, folder: Path, name: str, settings: dict[str, Any]) -> Self:
        info = connection_info(api_configuration())

        def session() -> aiohttp.ClientSession:
            return open_session(info)

        proxy = stack.enter_context(ApiProxy(info.server, session))
        made = cls(folder, name, proxy, settings)
        stack.callback(made.kill)
        return made

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self, version: str = "") -> Self:
        kubeconfig = self.proxy.write_kubeconfig(self.folder / f"{self.name}.kubeconfig")
        settings = self.folder / f"{self.name}.yaml"
        settings.write_text(json.dumps(self.settings))
        namespace = self.settings["watchNamespaces"][0]
        env = os.environ | {"KUBECONFIG": str(kubeconfig), "POD_NAME": self.name, "POD_NAMESPACE": namespace}
        how = ["-c", AS_VERSION.format(version)] if version else ["-m", "vllm_operator"]
        command = [sys.executable, *how, "run", "--config", str(settings)]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
        self._port = cluster.eventually(self._announced_port, f"{self.name} starts; see {self.log}", 60, 0.05)
        return self

    def _announced_port(self) -> int:
        for line in self.log.read_text().splitlines(keepends=True):
            whole = line.startswith("{") and line.endswith("\n")
            if whole and (said := json.loads(line))["event"] == "started":
                return int(said["management_port"])
        return 0

    def leads(self) -> bool:
        return "\nvllm_operator_leader 1.0" in self._page("metrics").text

    def ready(self) -> bool:
        return self._page("readyz").is_success

    def reconciles(self) -> int:
        """How many it has done since its start, with whatever result."""
        found = re.findall(r"\nvllm_operator_reconciles_total\{.*\} (\S+)", self._page("metrics").text)
        return int(sum(map(float, found)))

    def _page(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self._port}/{path}", trust_env=False, timeout=30)

    def wait_leading(self, seconds: float = 60) -> float:
        """Until it leads with full tables; gives the seconds that took."""
        began = time.monotonic()
        cluster.eventually(lambda: self.leads() and self.ready(), f"{self.name} leads", seconds, 0.05)
        return time.monotonic() - began

    def wait_silent(self, seconds: float = 60) -> None:
        """Until it has written nothing for QUIET_SECONDS; what writes in a loop never gets there.

        What an edit brings about goes on for a while: after a child come the status and Events, and again
        when the controllers and the scheduler have had their say. So there is no moment to count from.
        """
        began = time.monotonic()

        def silent() -> bool:
            last = max((call.at for call in self.proxy.writes()), default=began)
            return time.monotonic() - max(last, began) >= QUIET_SECONDS

        cluster.eventually(silent, lambda: f"silence; {[*map(str, self.proxy.writes()[-9:])]}", seconds)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None


@dataclass
class Operators:
    """Starts operators for one test, all for the same namespaces and the same Lease."""

    stack: ExitStack
    folder: Path
    namespaces: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str = "one", **settings: Any) -> OwnOperator:
        base = {
            "watchNamespaces": list(self.namespaces),
            "managementPort": 0,
            "managementHost": "127.0.0.1",
            "lease": QUICK_LEASE,
        }
        return OwnOperator.through_proxy(self.stack, self.folder, name, base | self.settings | settings)

    def start(self, name: str = "one", **settings: Any) -> OwnOperator:
        """Started, and leading."""
        made = self.make(name, **settings).start()
        made.wait_leading()
        return made
