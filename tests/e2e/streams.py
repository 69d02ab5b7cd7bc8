"""Streams that are read while a test does something to the cluster, and the gateway pods that carry them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cluster
import httpx
import releases

LONG = {"message": "Write a long story about a lighthouse.", "max_tokens": 400, "temperature": 0}


class Stream:
    """One /chat/stream read in a thread, so that a test can do something to the cluster meanwhile."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self.failure: Exception | None = None
        self.ended_at = float("inf")  # on the monotonic clock
        self._port, self._body = port, body
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        url = f"http://127.0.0.1:{self._port}/chat/stream"
        try:
            with httpx.stream("POST", url, json=self._body, timeout=60) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: "))
                if response.status_code == 200:
                    self.events.extend(json.loads(line[6:]) for line in lines)
                else:
                    refusal = f"{response.status_code}: {response.read().decode()}"
                    self.failure = AssertionError(refusal)
        except Exception as error:  # noqa: BLE001 - the test's thread asserts on it
            self.failure = error
        self.ended_at = time.monotonic()

    def wait_for_tokens(self, count: int) -> None:
        cluster.eventually(
            lambda: len(self.events) >= count or self.failure, f"{count} tokens", 120, every=0.02
        )

    def assert_whole(self) -> None:
        self._thread.join(timeout=600)
        assert self.failure is None, self.failure
        assert self.events, "no event at all"
        assert self.events[-1]["done"] is True, self.events[-1]
        assert not [event for event in self.events if "error" in event]
        assert self.events[-1].get("finish_reason") in {"stop", "length"}, self.events[-1]


@contextmanager
def gateway_pod() -> Iterator[tuple[str, int]]:
    """One gateway pod and a port-forward that stays with it, whatever the Service does."""
    name = gateway_names()[0]
    with gateway_port(name) as port:
        yield name, port


@contextmanager
def gateway_port(pod: str, model: str = "smollm2") -> Iterator[int]:
    """A local port that reaches a gateway pod, once that knows where the model's engine is."""
    with cluster.port_forward(f"pod/{pod}", 3000) as port:
        wait_routed(port, model)
        yield port


def wait_routed(port: int, model: str) -> None:
    """Until the gateway at this port has an endpoint of the model: it hears of one after the operator has."""
    cluster.eventually(lambda: routed(port, model), f"{model} is routed by the gateway", 60)


def routed(port: int, model: str) -> bool:
    answer = httpx.get(f"http://127.0.0.1:{port}/models", timeout=30).json()
    return any(model in entry["names"] and entry["ready"] for entry in answer["models"])


def gateway_names() -> list[str]:
    """The gateway's pods that are not being deleted."""
    return [pod["metadata"]["name"] for pod in releases.component_pods("gateway")]


def gateways_ready() -> bool:
    """By the pods: a Deployment's status may be of before one of them was deleted."""
    deployment = cluster.get("deployment", "vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE)
    assert deployment
    pods = releases.component_pods("gateway")
    return len(pods) == deployment["spec"]["replicas"] and all(map(cluster.is_ready, pods))
