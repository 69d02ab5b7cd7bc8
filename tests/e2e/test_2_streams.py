"""Streams on a bad day, on the real cluster.

Proves: a client that leaves frees the engine's slot (read from vLLM's own metrics); a killed operator changes
nothing for callers and takes up its work again; a gateway pod that is deleted finishes its streams and is
replaced; one that is killed is replaced; a rollout finishes the streams of the pod that goes.
"""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing

import cluster
import httpx
import pytest
import releases
from streams import LONG, Stream, gateway_pod, gateways_ready

# Some 35 s of tokens, whatever the model would say.
ENDLESS = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Write a long story."}],
    "max_tokens": 1900,
    "ignore_eos": True,
    "stream": True,
}


def wait_running(pod: str, number: int) -> None:
    """Until so many requests run. vLLM's gauge follows its engine's steps with some delay."""
    cluster.eventually(lambda: cluster.running_requests(pod) == number, f"{number} run", 20, every=0.05)


@pytest.mark.parametrize("path", ["/chat/stream", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_the_engine(gateway: int, smollm2: str, path: str) -> None:
    (pod,) = cluster.engine_pods(smollm2)
    name = pod["metadata"]["name"]
    body = ENDLESS if path.startswith("/v1") else {**LONG, "max_tokens": 1500}
    with httpx.stream("POST", f"http://127.0.0.1:{gateway}{path}", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: httpx closes the connection when its iterator is collected
        next(lines)
        wait_running(name, 1)
    left = time.monotonic()
    wait_running(name, 0)
    print(f"slot free {time.monotonic() - left:.2f} s after the client left")


def test_a_unary_client_that_leaves_frees_the_engine(gateway: int, smollm2: str) -> None:
    (pod,) = cluster.engine_pods(smollm2)
    name = pod["metadata"]["name"]
    body = json.dumps({**ENDLESS, "stream": False})
    with closing(http.client.HTTPConnection("127.0.0.1", gateway, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_running(name, 1)
    wait_running(name, 0)


def test_a_killed_operator_goes_on_where_it_was(gateway: int, smollm2: str) -> None:
    stream = Stream(gateway, LONG)
    stream.wait_for_tokens(3)
    (before,) = releases.component_pods("operator")
    killed = ("--grace-period=0", "--force")
    cluster.delete("pod", before["metadata"]["name"], cluster.SYSTEM_NAMESPACE, *killed)
    cluster.delete("service", f"{smollm2}-engine")
    stream.assert_whole()
    cluster.eventually(lambda: cluster.get("service", f"{smollm2}-engine"), "the Service is back", 60)
    cluster.eventually(releases.operator_leads, "another operator leads", 120)
    cluster.wait_settled(smollm2)


def test_a_deleted_gateway_pod_finishes_its_streams(smollm2: str) -> None:
    with gateway_pod() as (pod, port):
        stream = Stream(port, LONG)
        stream.wait_for_tokens(3)
        cluster.delete("pod", pod, cluster.SYSTEM_NAMESPACE, "--wait=false")
        stream.assert_whole()
    cluster.eventually(gateways_ready, "all gateways ready", 180)


def test_a_killed_gateway_is_replaced(smollm2: str) -> None:
    with gateway_pod() as (pod, _):
        cluster.delete("pod", pod, cluster.SYSTEM_NAMESPACE, "--grace-period=0", "--force")
    cluster.eventually(gateways_ready, "all gateways ready", 180)
    with gateway_pod() as (pod, port):
        Stream(port, {**LONG, "max_tokens": 8}).assert_whole()


def test_a_rollout_finishes_the_streams_of_the_pod_that_goes(gateway: int, smollm2: str) -> None:
    (old,) = cluster.engine_pods(smollm2)
    stream = Stream(gateway, {**LONG, "max_tokens": 700})
    stream.wait_for_tokens(3)
    cluster.patch_spec(smollm2, {"engine": {"maxNumSeqs": 16}})
    cluster.eventually(
        lambda: (
            "deletionTimestamp"
            in (cluster.get("pod", old["metadata"]["name"]) or {"metadata": {}})["metadata"]
            or stream.failure
            or not cluster.get("pod", old["metadata"]["name"])
        ),
        "the old pod is asked to go",
        300,
    )
    stream.assert_whole()
    cluster.wait_settled(smollm2)
    (new,) = cluster.engine_pods(smollm2)
    assert new["metadata"]["name"] != old["metadata"]["name"]
    assert "--max-num-seqs" in json.dumps(new["spec"]["containers"][0])
