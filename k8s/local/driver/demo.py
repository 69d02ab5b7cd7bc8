"""`make demo`: from nothing to a chat streamed by a real vLLM, and what to type next.

Each step is one that a user could type; what is typed is what is run here.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clusters
from console import Step, duration, say, step
from paths import LOGS, ROOT
from shell import DriverError, output, run

NAMESPACE = "vllm-fleet"
MODEL = "smollm2"
EXAMPLE = ROOT / "k8s" / "examples" / "smollm2.yaml"
READY_SECONDS = 600
QUESTION = "Why is the sky blue? Answer in two sentences."
LOG = LOGS / "demo.log"


def main() -> None:
    began = time.monotonic()
    say("vllm-fleet demo: a Kubernetes, the chart, a real vLLM on CPU, a streamed chat")
    clusters.up(images=True)
    with step("Python environment with the OpenAI client"):
        run([sys.executable, ROOT / "hack" / "setup_venv.py"], LOG)
    install()
    apply_and_wait()
    with port_forward() as port:
        chat_stream(port)
        openai_chat(port)
    say(f"\nDone {duration(time.monotonic() - began)}.")
    what_next()


def tool(name: str) -> Path | str:
    return clusters.tool(name)


def kubectl(*arguments: str) -> str:
    return output([tool("kubectl"), *arguments], env=clusters.environment())


def install() -> None:
    chart = str(ROOT / "charts" / "vllm-fleet")
    command = [tool("helm"), "upgrade", "--install", NAMESPACE, chart, "-n", NAMESPACE, "--create-namespace"]
    with step("helm install vllm-fleet"):
        run([*command, *registry(), "--wait", "--timeout", "5m"], LOG, env=clusters.environment())


def registry() -> list[str]:
    """Where a cluster that this driver has not made pulls the images from: IMAGE_REGISTRY, if set."""
    named = os.environ.get("IMAGE_REGISTRY", "").rstrip("/")
    engine = f"operator.config.images.cpu={named}/vllm-fleet/vllm-cpu:0.32.0"
    return ["--set", f"image.registry={named}", "--set", engine] if named else []


def apply_and_wait() -> None:
    """Applies the example and shows the model's own words until it is Ready."""
    with step(f"kubectl apply -f {EXAMPLE.relative_to(ROOT)}"):
        kubectl("apply", "-f", str(EXAMPLE))
    with step(f"model {MODEL} becomes Ready") as work:
        seen = ""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            ready = ready_condition()
            seen = report(work, ready, seen)
            if ready.get("status") == "True":
                return
            if time.monotonic() > deadline:
                raise DriverError(
                    f"not Ready after {READY_SECONDS} s: {seen}. See: kubectl describe vllm {MODEL}"
                )
            time.sleep(0.5)


def ready_condition() -> dict[str, Any]:
    model = json.loads(kubectl("get", "vllm", MODEL, "-o", "json"))
    conditions = model.get("status", {}).get("conditions", [])
    return next((dict(c) for c in conditions if c["type"] == "Ready"), {})


def report(work: Step, ready: dict[str, Any], seen: str) -> str:
    """Keeps the live line at the condition's words, and leaves a line behind whenever the reason changes."""
    words = f"{ready.get('reason', 'Pending')}: {ready.get('message', 'not seen by the operator yet')}"
    work.detail = words
    reason = words.split(":", 1)[0]
    if reason != seen.split(":", 1)[0]:
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        say(f"{clear}    {work.elapsed:5.1f} s  {words}")
    return words


@contextmanager
def port_forward() -> Iterator[int]:
    command = [str(tool("kubectl")), "-n", NAMESPACE, "port-forward", "svc/vllm-fleet-gateway", ":3000"]
    process = subprocess.Popen(
        command, env=clusters.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if not found:
            raise DriverError(f"kubectl port-forward said: {line.strip()}")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(timeout=10)


def wait_until_routed(port: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v1/models")
        listed = json.load(connection.getresponse())
        if MODEL in {entry["id"] for entry in listed["data"]}:
            return
        time.sleep(0.2)
    raise DriverError(f"the gateway does not list {MODEL} after {seconds:.0f} s")


def chat_stream(port: int) -> None:
    """POST /chat/stream, each token printed as it comes."""
    wait_until_routed(port)
    say(f"\nPOST /chat/stream: {QUESTION}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"message": QUESTION, "temperature": 0, "max_tokens": 96})
    connection.request("POST", "/chat/stream", body, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DriverError(f"/chat/stream answered {response.status}: {response.read().decode()}")
    sent, tokens = time.monotonic(), 0
    for line in response:
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                raise DriverError(f"the stream ended with {event['error']}")
            tokens += "token" in event
            sys.stdout.write(event.get("token", ""))
            sys.stdout.flush()
    say(f"\n  ({tokens} tokens in {time.monotonic() - sent:.1f} s)")


def openai_chat(port: int) -> None:
    say("\nThe same gateway through OpenAI's Python client:")
    client = ROOT / "k8s" / "examples" / "clients" / "openai_chat.py"
    python = ROOT / ".venv" / "bin" / "python"
    address = f"http://127.0.0.1:{port}/v1"
    command = [str(python), str(client), address, MODEL, "What is the capital of France?"]
    if subprocess.run(command, check=False).returncode:
        raise DriverError("the OpenAI client failed; what it said stands above")


def what_next() -> None:
    kubeconfig = clusters.environment()["KUBECONFIG"]
    address = kubectl("-n", NAMESPACE, "get", "svc", "vllm-fleet-gateway", "-o", "jsonpath={.spec.clusterIP}")
    chat = '{"message": "Write a poem about AI", "max_tokens": 64}'
    forward = f"kubectl -n {NAMESPACE} port-forward svc/vllm-fleet-gateway 3000"
    say(f"""
Try next:
  export KUBECONFIG={kubeconfig} PATH={Path(str(tool("kubectl"))).parent}:$PATH
  kubectl get vllm                        # model, ready, replicas, GPUs, reason
  kubectl describe vllm {MODEL}           # conditions and events, in words
  kubectl edit vllm {MODEL}               # any field; it rolls out, running streams finish
  {forward} &
  curl -N http://127.0.0.1:3000/chat/stream -H 'Content-Type: application/json' -d '{chat}'
  curl http://127.0.0.1:3000/v1/models""")
    if clusters.on_this_machine():
        say(f"  curl http://{address}:3000/health     # the Service's own address, from this machine")
    say("  make demo-down                          # remove everything but the build cache")
