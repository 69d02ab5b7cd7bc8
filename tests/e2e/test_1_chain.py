"""The whole chain with real parts: chart, operator, scheduler, a real vLLM, EndpointSlice, gateway, SSE.

Proves: `kubectl wait` and the printed columns; the scheduler placed the pod on nvidia.com/gpu; /chat/stream
gives tokens one by one, JSON in every data line, done last; the OpenAI client streams and does not; /models
and /v1/models agree; a caller's mistakes are answered in words.
"""

from __future__ import annotations

import json
import time
from typing import Any

import cluster
import httpx
import openai
from streams import LONG

QUESTION = {"message": "Count from one to ten in words.", "temperature": 0, "max_tokens": 48}


def events_of(response: httpx.Response) -> list[tuple[float, Any]]:
    """Each SSE event of a response with the time of its arrival; a line that is not JSON data fails."""
    found = []
    for line in response.iter_lines():
        if line and not line.startswith(":"):
            assert line.startswith("data: "), line
            found.append((time.monotonic(), json.loads(line[6:])))
    return found


def test_the_model_is_ready_and_kubectl_says_so(smollm2: str) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", f"vllm/{smollm2}", "--timeout=60s")
    header, row = cluster.kubectl("get", "vllm", smollm2).splitlines()
    assert header.split() == ["NAME", "MODEL", "READY", "REPLICAS", "GPUS", "REASON", "AGE"]
    name, model, ready, replicas, gpus, reason, _age = row.split()
    assert (name, ready, replicas, gpus, reason) == (smollm2, "True", "1", "1", "Serving")
    assert model == cluster.example("smollm2.yaml")["spec"]["model"]


def test_the_scheduler_placed_the_pod_on_a_gpu(smollm2: str) -> None:
    (pod,) = cluster.engine_pods(smollm2)
    (engine,) = pod["spec"]["containers"]
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["schedulerName"] == "default-scheduler"
    assert pod["spec"]["nodeName"]
    assert pod["spec"]["enableServiceLinks"] is False
    assert pod["spec"]["automountServiceAccountToken"] is False


def test_chat_stream_gives_tokens_one_by_one(gateway: int) -> None:
    """A long answer: this process may be kept from reading for a while, but not from its begin to its end."""
    url = f"http://127.0.0.1:{gateway}/chat/stream"
    with httpx.stream("POST", url, json={**LONG, "max_tokens": 150}, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        events = events_of(response)
    *tokens, (_, last) = events
    assert last["done"] is True
    assert all(set(event) == {"token"} for _, event in tokens)
    assert len(tokens) > 10
    arrivals = {round(at, 2) for at, _ in tokens}
    assert len(arrivals) > 5, "the tokens came in one lump, not one by one"


def test_chat_answers_whole_and_equals_the_stream(gateway: int) -> None:
    base = f"http://127.0.0.1:{gateway}"
    whole = httpx.post(f"{base}/chat", json=QUESTION, timeout=60).json()
    with httpx.stream("POST", f"{base}/chat/stream", json=QUESTION, timeout=60) as response:
        streamed = "".join(event.get("token", "") for _, event in events_of(response))
    assert whole["response"] == streamed
    assert whole["usage"]["completion_tokens"] > 10


def test_the_openai_client_streams_and_does_not(gateway: int, smollm2: str) -> None:
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{gateway}/v1", api_key="none", timeout=60, max_retries=0
    )
    assert smollm2 in {model.id for model in client.models.list()}
    messages: Any = [{"role": "user", "content": "Say hello."}]
    arguments: Any = {"model": smollm2, "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**arguments)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**arguments, stream=True)
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    usage = [
        chunk.usage
        for chunk in client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert usage[-1].completion_tokens == whole.usage.completion_tokens


def test_models_health_and_the_namespaced_name(gateway: int, smollm2: str) -> None:
    base = f"http://127.0.0.1:{gateway}"
    assert httpx.get(f"{base}/health", timeout=60).status_code == 200
    assert smollm2 in json.dumps(httpx.get(f"{base}/models", timeout=60).json())
    body = {**QUESTION, "model": f"default/{smollm2}", "max_tokens": 4}
    assert httpx.post(f"{base}/chat", json=body, timeout=60).status_code == 200


def test_mistakes_are_answered_in_words(gateway: int) -> None:
    base = f"http://127.0.0.1:{gateway}"
    unknown = httpx.post(f"{base}/v1/chat/completions", json={"model": "nobody", "messages": []}, timeout=60)
    assert unknown.status_code == 404
    assert "nobody" in unknown.json()["error"]["message"]
    assert httpx.post(f"{base}/chat", json={"temperature": 0}, timeout=60).status_code == 400
    too_hot = httpx.post(f"{base}/chat", json={**QUESTION, "temperature": 99}, timeout=60)
    assert too_hot.status_code == 400
    assert "temperature" in json.dumps(too_hot.json())
