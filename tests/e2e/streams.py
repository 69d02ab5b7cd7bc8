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
                self.events.extend(json.loads(line[6:]) for line in lines)
        except Exception as error:  # noqa: BLE001 - the test's thread asserts on it
            self.failure = error
        self.ended_at = time.monotonic()

    def wait_for_tokens(self, count: int) -> None:
        cluster.eventually(
            lambda: len(self.events) >= count or self.failure, f"{count} tokens", 60, every=0.02
        )

    def assert_whole(self) -> None:
        self._thread.join(timeout=120)
        assert self.failure is None, self.failure
        assert self.events, "no event at all"
        assert self.events[-1]["done"] is True, self.events[-1]
        assert not [event for event in self.events if "error" in event]
        assert self.events[-1].get("finish_reason") in {"stop", "length"}, self.events[-1]


@contextmanager
def gateway_pod() -> Iterator[tuple[str, int]]:
    """One gateway pod and a port-forward that stays with it, whatever the Service does."""
    name = gateway_names()[0]
    with cluster.port_forward(f"pod/{name}", 3000) as port:
        yield name, port


def gateway_names() -> list[str]:
    """The gateway's pods that are not being deleted."""
    pods = cluster.items("pods", "app.kubernetes.io/component=gateway", cluster.SYSTEM_NAMESPACE)
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def gateways_ready() -> bool:
    deployment = cluster.get("deployment", "vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE)
    assert deployment
    return bool(deployment["status"].get("readyReplicas", 0) == deployment["spec"]["replicas"])
