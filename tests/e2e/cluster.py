"""The cluster as the end-to-end tests see it: kubectl, bounded waiting, port-forwards, engine metrics.

Everything goes through kubectl and the API server, as a user would do it, so the same tests run on a local
cluster, on kind, and on any cluster that KUBECONFIG names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

import clusters

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".cluster" / "bin"
EXAMPLES = ROOT / "k8s" / "examples"
SYSTEM_NAMESPACE = "vllm-fleet"
T = TypeVar("T")
Manifest = dict[str, Any]


def tool(name: str) -> str:
    """The cluster driver's own kubectl or helm, which match its API server; else the one on PATH."""
    own = BIN / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is neither in .cluster/bin nor on PATH"
    return found


def run(*command: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, input=stdin, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    return run(tool("kubectl"), *arguments, stdin=stdin).stdout


def get(kind: str, name: str, namespace: str = "default") -> Manifest | None:
    out = kubectl("-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json")
    return json.loads(out) if out.strip() else None


def items(kind: str, selector: str, namespace: str = "default") -> list[Manifest]:
    found = json.loads(kubectl("-n", namespace, "get", kind, "-l", selector, "-o", "json"))
    return list(found["items"])


def apply(manifest: Manifest, namespace: str = "default") -> None:
    kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(manifest))


def patch_spec(name: str, spec: Mapping[str, Any], namespace: str = "default") -> None:
    kubectl("-n", namespace, "patch", "vllm", name, "--type=merge", "-p", json.dumps({"spec": spec}))


def delete(kind: str, name: str, namespace: str = "default", *flags: str) -> None:
    kubectl("-n", namespace, "delete", kind, name, "--ignore-not-found", *flags)


def eventually(look: Callable[[], T | None], what: str, seconds: float, every: float = 0.25) -> T:
    """Polls `look` until it gives something true; fails with `what` and the last value when time is up."""
    deadline = time.monotonic() + seconds
    seen = look()
    while not seen:
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what} (last seen: {seen!r})"
        time.sleep(every)
        seen = look()
    return seen


def condition(name: str, kind: str, namespace: str = "default") -> Manifest:
    """One condition of a VLLMModel, empty while it has none."""
    model = get("vllm", name, namespace) or {}
    conditions = model.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def settled(name: str, namespace: str = "default") -> bool:
    """Ready, at the generation that the spec has now, with no rollout under way."""
    model = get("vllm", name, namespace) or {}
    status, generation = model.get("status", {}), model.get("metadata", {}).get("generation")
    states = {c["type"]: c["status"] for c in status.get("conditions", [])}
    current = status.get("observedGeneration") == generation
    return current and states.get("Ready") == "True" and states.get("Reconciling", "False") == "False"


def wait_settled(name: str, seconds: float = 300) -> None:
    eventually(lambda: settled(name), f"{name} Ready; {condition(name, 'Ready')}", seconds)


@dataclass(frozen=True)
class Seen:
    """A watch event, and when it came, on the monotonic clock."""

    at: float
    type: str
    body: Manifest


class Watch:
    """What happened to one kind of objects in a namespace, as it comes."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def follow(self, lines: IO[str]) -> None:
        for line in lines:
            event = json.loads(line)
            self.seen.append(Seen(time.monotonic(), event["type"], event["object"]))

    def first(self, fits: Callable[[Seen], bool], what: str, seconds: float = 30) -> Seen:
        """The oldest event that fits, waited for."""
        return eventually(lambda: next(filter(fits, self.seen), None), what, seconds, every=0.01)


@contextmanager
def watching(path: str) -> Iterator[Watch]:
    """`path` is a list's, such as /apis/apps/v1/namespaces/default/deployments."""
    command = [tool("kubectl"), "get", "--raw", f"{path}?watch=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watch = Watch()
        reader = threading.Thread(target=watch.follow, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield watch
        finally:
            process.terminate()
            reader.join()


def engine_pods(name: str, namespace: str = "default") -> list[Manifest]:
    """The pods of a model that are not being deleted."""
    pods = items("pods", f"vllm-fleet.dev/model={name},app.kubernetes.io/component=engine", namespace)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def running_requests(pod: str, namespace: str = "default") -> float:
    """vLLM's own count of running requests, read from its metrics through the API server's pod proxy."""
    text = kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}:8000/proxy/metrics")
    values = re.findall(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", text, flags=re.MULTILINE)
    assert values, "vllm:num_requests_running is not among the engine's metrics"
    return sum(map(float, values))


@contextmanager
def port_forward(target: str, port: int, namespace: str = SYSTEM_NAMESPACE) -> Iterator[int]:
    """`kubectl port-forward` to a Service or pod; yields the local port that kubectl chose."""
    command = [tool("kubectl"), "-n", namespace, "port-forward", target, f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"127\.0\.0\.1:(\d+)", line)
            assert found, f"port-forward to {target} said: {line!r}"
            yield int(found[1])
        finally:
            process.terminate()


def example(name: str) -> Manifest:
    documents = list(yaml.safe_load_all((EXAMPLES / name).read_text()))
    assert len(documents) == 1
    return dict(documents[0])


def gpu_count() -> int:
    """The `nvidia.com/gpu` that all nodes together can allocate."""
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    return sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", "0")) for node in nodes)


def has_kubeconfig() -> bool:
    return bool(os.environ.get("KUBECONFIG"))


def is_the_drivers_own() -> bool:
    """Whether KUBECONFIG names the local cluster, whose programs the driver can stop."""
    named = os.environ.get("KUBECONFIG", "")
    return bool(named) and clusters.on_this_machine() and Path(named) == clusters.kubeconfig()
