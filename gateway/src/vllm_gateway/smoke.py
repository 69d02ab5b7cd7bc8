"""`python -m vllm_gateway.smoke URL`: streams one chat through a running gateway and says what came of it.

`helm test` runs it in a pod of the gateway's image, on the way that callers take: name, Service, gateway,
engine. It ends with 1 where something that should work does not. Where there is nothing to chat with yet, it
says what is missing and ends with 0: the release is not at fault.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

ANSWER_SECONDS = 30.0
TOKEN_SECONDS = 300.0
QUESTION = "Say hello."
NO_MODEL = """\
No VLLMModel is served yet, so no chat was streamed; the gateway itself answers. Apply a model, for example
  kubectl apply -f k8s/examples/llama-8b.yaml     (smollm2.yaml where there is no GPU)
wait for it with `kubectl get vllm --all-namespaces --watch`, and run the test again."""
NO_KEY = """\
The gateway asks for an API key, as it should, and none was given: no chat was streamed. To test one, name a
Secret that holds a key: gateway.test.keySecret.name and gateway.test.keySecret.key."""


class Failed(Exception):
    """What does not work, for a person."""


@dataclass(frozen=True)
class Target:
    """A gateway's base URL, the API key to send and the model to ask; "" where there is none.

    `insecure` takes any certificate, for callers that use another name than the certificate's.
    """

    url: str
    key: str = ""
    model: str = ""
    insecure: bool = False

    def open(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = ANSWER_SECONDS) -> Any:
        """The answer, still to be read. Raises Failed where none comes, HTTPError for a refusal."""
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)  # noqa: S310 - see main
        try:
            return urllib.request.urlopen(request, timeout=seconds, context=self._tls())  # noqa: S310
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise Failed(f"{self.url}{path} does not answer: {getattr(error, 'reason', error)}") from error

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def check(target: Target) -> str:
    """What was found, for a person. Raises Failed."""
    with target.open("/health"):
        pass
    try:
        with target.open("/models") as answer:
            models = json.load(answer)["models"]
    except urllib.error.HTTPError as refusal:
        if refusal.code == 401 and not target.key:
            return NO_KEY
        raise
    if not models:
        return NO_MODEL
    return chat(target, pick(models, target.model))


def pick(models: Sequence[Mapping[str, Any]], wanted: str) -> str:
    """The full name of the wanted model, or of the first that is ready. Raises Failed."""
    named = [model for model in models if not wanted or wanted in model["names"]]
    for model in named:
        if model["ready"]:
            return str(model["name"])
    if not named:
        raise Failed(f"no model is called {wanted}; there are {', '.join(m['name'] for m in models)}")
    states = (f"{model['name']} ({model['reason']}: {model['message']})" for model in named)
    raise Failed(f"no model is ready: {'; '.join(states)}")


def chat(target: Target, model: str) -> str:
    body = {"model": model, "message": QUESTION, "max_tokens": 16}
    began = time.monotonic()
    with target.open("/chat/stream", body, TOKEN_SECONDS) as answer:
        tokens = list(read_tokens(answer))
    if not tokens:
        raise Failed(f"the stream of {model} ended without a token")
    seconds = time.monotonic() - began
    return f"{model} streamed {len(tokens)} tokens in {seconds:.1f} s: {''.join(tokens)!r}"


def read_tokens(stream: IO[bytes]) -> Iterator[str]:
    """The tokens of `/chat/stream`, those of thoughts too, up to its last event. Raises Failed where that is
    missing or an error.
    """
    for line in _lines(stream):
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise Failed(f"the stream ended with an error: {event['error']['message']}")
        if event.get("done"):
            return
        yield event.get("token") or event.get("reasoning", "")
    raise Failed("the stream broke off before its last event")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"the stream broke off: {type(error).__name__}: {error}") from error


def message_of(refusal: urllib.error.HTTPError) -> str:
    text = refusal.read(4096).decode(errors="replace")
    return f"{refusal.url} answers {refusal.code}: {text}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm_gateway.smoke", description="Stream one chat and report.")
    parser.add_argument("url", help="the gateway, such as http://127.0.0.1:3000")
    parser.add_argument("--model", default="", help="its name (default: the first that is ready)")
    parser.add_argument("--insecure", action="store_true", help="take any certificate")
    options = parser.parse_args(arguments)
    if not options.url.startswith(("http://", "https://")):
        parser.error("the URL must begin with http:// or https://")
    target = Target(options.url, os.environ.get("API_KEY", ""), options.model, options.insecure)
    try:
        print(check(target))
    except (Failed, urllib.error.HTTPError) as error:
        print(message_of(error) if isinstance(error, urllib.error.HTTPError) else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
