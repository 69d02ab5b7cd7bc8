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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
NOT_REACHED = re.compile(
    r"^(Unable to connect to the server|Error: Kubernetes cluster unreachable): .*"
    r"(net/http: TLS handshake timeout|i/o timeout)$",
    re.MULTILINE,
)


def tool(name: str) -> str:
    """The cluster driver's own kubectl or helm, which match its API server; else the one on PATH."""
    own = BIN / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is neither in .cluster/bin nor on PATH"
    return found


def run(*command: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`check`: fails unless the program exits with 0.

    kubectl and helm are called again where no connection to the API server came about in the 10 s that they
    wait, as on a machine that stands still for a while: nothing was asked of it yet.
    """
    done = _run(command, stdin)
    for _ in range(2):
        if done.returncode and NOT_REACHED.search(done.stderr):
            done = _run(command, stdin)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _run(command: tuple[str, ...], stdin: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, input=stdin, capture_output=True, text=True, timeout=600)


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


def eventually(
    look: Callable[[], T | None], what: str | Callable[[], str], seconds: float, every: float = 0.25
) -> T:
    """Polls `look` until it gives something true; fails with `what` and the last value when time is up.

    A bound says when to give up, and not how long something may take: it is for a machine that is busy.
    """
    deadline = time.monotonic() + seconds
    seen = look()
    while not seen:
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"after {seconds:.0f} s still not: {told} (last seen: {seen!r})")
        time.sleep(every)
        seen = look()
    return seen


def conditions(name: str, namespace: str = "default") -> dict[str, Manifest]:
    """All conditions of a VLLMModel by type, as one status has them."""
    model = get("vllm", name, namespace) or {}
    return {c["type"]: c for c in model.get("status", {}).get("conditions", [])}


def condition(name: str, kind: str, namespace: str = "default") -> Manifest:
    """One condition of a VLLMModel, empty while it has none."""
    return conditions(name, namespace).get(kind, {})


def settled(name: str, namespace: str = "default") -> bool:
    """Ready, at the generation that the spec has now, with no rollout under way; and so are its children.

    The status alone may be older than what has just been done to a child.
    """
    model = get("vllm", name, namespace) or {}
    status, generation = model.get("status", {}), model.get("metadata", {}).get("generation")
    states = {c["type"]: c["status"] for c in status.get("conditions", [])}
    told = states.get("Ready") == "True" and states.get("Reconciling", "False") == "False"
    return told and status.get("observedGeneration") == generation and converged(name, namespace)


def converged(name: str, namespace: str = "default") -> bool:
    """Whether a model's Deployment has the pods that it asks for, each ready, and others are told to end."""
    engines = f"vllm-fleet.dev/model={name},app.kubernetes.io/component=engine"
    found = items("deployments,replicasets,pods", engines, namespace)
    makers = [item for item in found if item["kind"] != "Pod"]
    pods = staying(item for item in found if item["kind"] == "Pod")
    wanted = [item["spec"]["replicas"] for item in makers if item["kind"] == "Deployment"]
    return all(map(observed, makers)) and wanted == [len(pods)] and all(map(is_ready, pods))


def observed(maker: Manifest) -> bool:
    """Whether the controller of a Deployment or ReplicaSet has seen its spec, and made or ended pods."""
    status = maker["status"]
    seen = status.get("observedGeneration") == maker["metadata"]["generation"]
    return bool(seen and status.get("replicas", 0) == maker["spec"]["replicas"])


def staying(found: Iterable[Manifest]) -> list[Manifest]:
    """Those that are not being deleted."""
    return [item for item in found if "deletionTimestamp" not in item["metadata"]]


def is_ready(pod: Manifest) -> bool:
    told = pod["status"].get("conditions", ())
    return any((c["type"], c["status"]) == ("Ready", "True") for c in told)


def wait_settled(name: str, seconds: float = 300) -> None:
    eventually(lambda: settled(name), lambda: f"{name} is settled; {conditions(name)}", seconds)


def remove_model(name: str, namespace: str = "default") -> None:
    """With all that was made for it, and without waiting for its streams; another may have the name then."""
    mine = f"vllm-fleet.dev/model={name}"

    def gone(kinds: str, seconds: float) -> None:
        eventually(lambda: not items(kinds, mine, namespace), f"{kinds} of {name} are gone", seconds)

    delete("vllm", name, namespace)
    gone("deployments,replicasets,jobs", 60)  # else they would replace their pods
    kubectl("-n", namespace, "delete", "pods", "-l", mine, "--grace-period=1", "--wait=false")
    gone("pods,services,endpointslices,persistentvolumeclaims,secrets,networkpolicies", 120)


@contextmanager
def lent_namespace(name: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
    """A namespace for the length of the block; one of an earlier run may still be about to go."""
    eventually(lambda: staying([get("namespace", name) or {"metadata": {}}]), f"a former {name} is gone", 120)
    metadata = {"name": name, "labels": dict(labels or {})}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    try:
        eventually(lambda: get("serviceaccount", "default", name), f"{name} takes pods", 60)
        yield name
    finally:
        delete("namespace", name, "default", "--wait=false")


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
            if line.endswith("\n"):  # else kubectl was ended in the middle of it
                event = json.loads(line)
                self.seen.append(Seen(time.monotonic(), event["type"], event["object"]))

    def first(self, fits: Callable[[Seen], bool], what: str, seconds: float = 60) -> Seen:
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
    return staying(
        items("pods", f"vllm-fleet.dev/model={name},app.kubernetes.io/component=engine", namespace)
    )


def running_requests(pod: str, namespace: str = "default") -> float:
    """vLLM's own count of running requests, read from its metrics through the API server's pod proxy."""
    text = kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}:8000/proxy/metrics")
    values = re.findall(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", text, flags=re.MULTILINE)
    assert values, "vllm:num_requests_running is not among the engine's metrics"
    return sum(map(float, values))


@contextmanager
def port_forward(target: str, port: int, namespace: str = SYSTEM_NAMESPACE) -> Iterator[int]:
    """`kubectl port-forward` to a pod; yields the local port that kubectl chose.

    Of a Service it leads to a pod that stays: kubectl itself takes the one that has been ready for longest,
    in a rollout one that ends. A caller that leaves in the middle of an answer needs a forward of its own,
    since kubectl gives up the whole when one connection breaks.
    """
    if target.startswith("svc/"):
        target = f"pod/{ready_pod_of(target.removeprefix('svc/'), namespace)}"
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


def ready_pod_of(service: str, namespace: str) -> str:
    """The name of a ready pod behind a Service that is not about to end."""
    found = get("service", service, namespace)
    assert found, service
    selector = ",".join(f"{key}={value}" for key, value in found["spec"]["selector"].items())

    def name() -> str:
        ready = filter(is_ready, staying(items("pods", selector, namespace)))
        return next((str(pod["metadata"]["name"]) for pod in ready), "")

    return eventually(name, f"a pod of {service} is ready", 60)


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
