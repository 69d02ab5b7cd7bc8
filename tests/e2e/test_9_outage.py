"""The API server is away for two minutes.

Proves, of the list of failures that the project is judged by:
E19  streams through the gateway go on, begun before, during and after; no container of the operator or the
     gateway restarts; of two operators none leads without the Lease and never both do; an edit made right
     after the return is taken up by operator and gateway within seconds, once pods reach it.

It is stopped by the cluster's driver, so this runs on the local cluster alone. Meanwhile one stream follows
the other, so that the engine takes all of the machine's CPU and our containers have what their requests are
worth. The node controller waits for longer than the outage (k8s/local/driver/config.py), or it could mark the
node NotReady before the kubelet has reported, and Services would refuse new connections meanwhile.
"""

from __future__ import annotations

import datetime
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import cluster
import httpx
import pytest
import releases
from operators import model, own_namespace
from streams import gateway_names, gateway_port

pytestmark = [pytest.mark.e2e, pytest.mark.local_cluster]
OUTAGE_SECONDS = 120
STREAM = {
    "model": "smollm2",
    "message": "Write a long story about a lighthouse.",
    "max_tokens": 200,
    "temperature": 0,
}
OPERATOR = "deployment/vllm-fleet-operator"


def driver(*arguments: str) -> None:
    cluster.run(sys.executable, str(cluster.ROOT / "k8s" / "local" / "driver"), *arguments)


@pytest.fixture
def two_operators(release: None) -> Iterator[list[str]]:
    """The names of both pods."""
    scale = ("-n", cluster.SYSTEM_NAMESPACE, "scale", OPERATOR)
    cluster.kubectl(*scale, "--replicas=2")
    try:
        cluster.kubectl("-n", cluster.SYSTEM_NAMESPACE, "rollout", "status", OPERATOR, "--timeout=300s")
        yield [pod["metadata"]["name"] for pod in releases.component_pods("operator")]
    finally:
        cluster.kubectl(*scale, "--replicas=1")
        cluster.eventually(
            lambda: len(releases.component_pods("operator")) == 1 and releases.operator_leads(),
            "one operator again, which leads",
            120,
        )


@pytest.fixture
def api_server() -> Iterator[None]:
    """Runs again at the end, whatever became of the test."""
    yield
    driver("start", "kube-apiserver")


def restarts() -> dict[str, int]:
    """By the uid of each pod of ours."""
    return {
        pod["metadata"]["uid"]: sum(item["restartCount"] for item in pod["status"]["containerStatuses"])
        for component in ("operator", "gateway")
        for pod in releases.component_pods(component)
    }


def gateway_url() -> str:
    """Of the Service: a port-forward leads through the API server."""
    service = cluster.get("service", "vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE)
    assert service
    return f"http://{service['spec']['clusterIP']}:3000"


def known_to(url: str, name: str) -> bool:
    return httpx.get(f"{url}/v1/models/{name}", timeout=30, trust_env=False).is_success


@dataclass
class Caller:
    """One stream after the other, until told to stop."""

    url: str
    whole: list[tuple[float, float]] = field(default_factory=list)  # begun, ended
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        cluster.eventually(lambda: self.whole or self.problems, "the first stream", 120)
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join(120)

    def _call(self) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not self._enough.is_set():
                began = time.time()
                try:
                    last = self._stream(client)
                except httpx.HTTPError as error:
                    last = repr(error)
                if last == "length":
                    self.whole.append((began, time.time()))
                else:
                    self.problems.append(f"{began:.1f}: {last}")
                    self._enough.wait(0.5)

    def _stream(self, client: httpx.Client) -> str:
        """The finish reason, or what came in its place."""
        with client.stream("POST", f"{self.url}/chat/stream", json=STREAM) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        events = [json.loads(line) for line in lines]
        if response.status_code != 200 or not events:
            return f"{response.status_code} {lines}"
        return str(events[-1].get("finish_reason") or events[-1])


@dataclass(frozen=True)
class Term:
    """When one replica led, in seconds of the clock that both share; endless while it does."""

    began: float
    ended: float


def terms(pods: list[str]) -> list[Term]:
    """As the replicas' logs tell, in order."""
    return sorted((term for pod in pods for term in terms_of(pod)), key=lambda term: term.began)


def terms_of(pod: str) -> Iterator[Term]:
    began: float | None = None
    for line in cluster.kubectl("-n", cluster.SYSTEM_NAMESPACE, "logs", pod).splitlines():
        said = json.loads(line)
        at = datetime.datetime.fromisoformat(said["time"]).timestamp()
        if said["event"] == "leading":
            began = at
        elif said["event"] == "not leading any more" and began is not None:
            yield Term(began, at)
            began = None
    if began is not None:
        yield Term(began, float("inf"))


def test_two_minutes_without_an_api_server(smollm2: str, two_operators: list[str], api_server: None) -> None:
    """E19"""
    for pod in gateway_names():
        with gateway_port(pod, smollm2):
            pass  # any of them may be asked through the Service
    url, before = gateway_url(), restarts()
    with own_namespace() as namespace, Caller(url) as caller:
        driver("stop", "kube-apiserver")
        stopped = time.time()
        assert not known_to(url, f"{namespace}/after")
        time.sleep(OUTAGE_SECONDS)
        back = time.time()
        driver("start", "kube-apiserver")
        apply_once_it_answers(namespace)
        # Pods reach it through its Service, which kube-proxy opens again when its own watch is back.
        cluster.eventually(leads_to_the_api_server, "the Service leads to the API server", 300, 0.2)
        applied = time.time()
        print(f"the Service leads to the API server {applied - back:.1f} s after its start")
        cluster.eventually(lambda: cluster.get("deployment", "after-engine", namespace), "the edit", 60, 0.05)
        print(f"Deployment {time.time() - applied:.1f} s after that")
        cluster.eventually(lambda: known_to(url, f"{namespace}/after"), "the gateway knows it", 60, 0.05)
        print(f"known to the gateway {time.time() - applied:.1f} s after that")
        time.sleep(5)
    assert restarts() == before
    during = [1 for began, ended in caller.whole if began > stopped and ended < back]
    over = [1 for began, ended in caller.whole if began < stopped < ended or began < back < ended]
    print(f"{len(during)} streams during the outage, {len(over)} across its ends, {len(caller.whole)} in all")
    assert caller.problems == []
    assert during
    cluster.eventually(lambda: terms(two_operators)[-1].began > back, "one says that it leads again", 30)
    led = terms(two_operators)
    assert not [term for term in led if term.began < back < term.ended], "somebody leads without a Lease"
    for former, latter in itertools.pairwise(led):
        assert former.ended <= latter.began, "two led at once"
    cluster.wait_settled(smollm2)


def leads_to_the_api_server() -> bool:
    service = cluster.get("service", "kubernetes")
    assert service
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((service["spec"]["clusterIP"], 443)) == 0


def apply_once_it_answers(namespace: str) -> None:
    """It refuses what needs its caches for a moment after its start."""

    def applied() -> bool:
        try:
            cluster.apply(model("after"), namespace)
        except AssertionError:
            return False
        return True

    cluster.eventually(applied, "the API server takes an edit", 120, 0.1)
