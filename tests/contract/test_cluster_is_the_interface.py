"""What the operator renders is what the gateway finds: operator and gateway against one API server.

Proves, for each model in k8s/examples: the slices that Kubernetes makes from the rendered Service are
taken for the model's own; a request by each name reaches the endpoint, under a name that the rendered engine
answers to; and a slice of a namesake with another uid, as after delete and create, is not taken. Real sockets
all the way; the pod is a fake engine, and the endpointslice controller's copying of labels is done here as
Kubernetes documents it: https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import FakeEngine
from http_caller import ask
from kube_api import VLLM_MODELS, Json, KubeApi, resource

from vllm_gateway.app import Gateway, Server
from vllm_gateway.settings import Settings
from vllm_operator.api.parsing import parse
from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.engine_keys import engine_key
from vllm_operator.render import render
from vllm_operator.settings import Settings as OperatorSettings

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "k8s" / "examples").glob("*.yaml"))
NAMESPACE = "team"


def models_in(path: Path) -> Iterator[Json]:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "VLLMModel":
            yield document


def slice_of(service: Json, port: int) -> Json:
    """What the endpointslice controller writes for a Service with one ready pod at 127.0.0.1:`port`."""
    metadata = service["metadata"]
    labels = metadata["labels"] | {
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": metadata["name"],
    }
    owner = {"apiVersion": "v1", "kind": "Service", "controller": True} | {
        key: metadata[key] for key in ("name", "uid")
    }
    (declared,) = service["spec"]["ports"]
    pod = {"kind": "Pod", "name": "p", "namespace": NAMESPACE, "uid": "p-1"}
    endpoint = {"addresses": ["127.0.0.1"], "conditions": {"ready": True}, "targetRef": pod}
    return {
        "metadata": {"name": f"{metadata['name']}-x", "labels": labels, "ownerReferences": [owner]},
        "addressType": "IPv4",
        "ports": [{"name": declared["name"], "port": port, "protocol": "TCP"}],
        "endpoints": [endpoint],
    }


class QuietServer(Server):
    """Leaves the process's signal handlers alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def running_gateway(**changes: Json) -> AsyncIterator[int]:
    settings = {"host": "127.0.0.1", "port": 0, "shutdownDelay": "0s", "drainTimeout": "0s", **changes}
    server = QuietServer(Gateway(Settings.model_validate(settings)))
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(5):
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def status_of(port: int, body: Json, wanted: int) -> int:
    """The answer's status, once discovery has come to `wanted` or two seconds have passed."""
    answer = await ask(port, "/v1/chat/completions", body)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            while answer.status != wanted:
                await asyncio.sleep(0.02)
                answer = await ask(port, "/v1/chat/completions", body)
    return answer.status


def put(api: KubeApi, body: Json) -> VLLMModel:
    """The model as the API server holds it, with the short names granted in its status."""
    created = api.create(VLLM_MODELS, NAMESPACE, copy.deepcopy(body))
    model = parse(created)
    api.patch_status(VLLM_MODELS, NAMESPACE, model.metadata.name, {"servedNames": list(model.served_names)})
    return model


def put_service(api: KubeApi, model: VLLMModel) -> Json:
    return api.create(resource("services"), NAMESPACE, rendered(model, "Service"))


def rendered(model: VLLMModel, kind: str) -> Any:
    return next(item for item in render(model, OperatorSettings()) if item["kind"] == kind)


def engine_names(model: VLLMModel) -> list[str]:
    """The names that the rendered engine answers to; with several nodes the leader's."""
    if model.spec.nodes > 1:
        template = rendered(model, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    else:
        template = rendered(model, "Deployment")["spec"]["template"]
    arguments: list[str] = template["spec"]["containers"][0]["args"]
    after = arguments[arguments.index("--served-model-name") + 1 :]
    return after[: next(at for at, item in enumerate(after) if item.startswith("--"))]


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubeApi]:
    async with KubeApi() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield server


@pytest.mark.parametrize(
    "body",
    [body for path in EXAMPLES for body in models_in(path)],
    ids=lambda body: body["metadata"]["name"],
)
async def test_a_request_reaches_the_pod_that_the_operator_rendered(api: KubeApi, body: Json) -> None:
    model = put(api, body)
    async with FakeEngine() as engine, running_gateway() as port:
        made = slice_of(put_service(api, model), engine.port)
        api.create(resource("endpointslices"), NAMESPACE, made)
        for name in (f"{NAMESPACE}/{model.metadata.name}", *model.served_names):
            request = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
            assert await status_of(port, request, 200) == 200
            assert engine.seen[-1].json()["model"] in engine_names(model)


async def test_a_slice_of_a_namesake_with_another_uid_is_not_taken(api: KubeApi) -> None:
    (body,) = models_in(next(path for path in EXAMPLES if path.stem == "smollm2"))
    model = put(api, body)
    async with FakeEngine() as engine, running_gateway() as port:
        foreign = slice_of(put_service(api, model), engine.port)
        foreign["metadata"]["labels"]["vllm-fleet.dev/model-uid"] = "of-the-deleted-one"
        api.create(resource("endpointslices"), NAMESPACE, foreign)
        request = {"model": model.metadata.name, "messages": [{"role": "user", "content": "hi"}]}
        assert await status_of(port, request, 503) == 503
        assert not [seen for seen in engine.seen if seen.path.startswith("/v1/chat")]


async def test_the_gateway_shows_the_key_that_the_operator_gave_the_engine(
    api: KubeApi, tmp_path: Path
) -> None:
    (body,) = models_in(next(path for path in EXAMPLES if path.stem == "smollm2"))
    model = put(api, body)
    master = tmp_path / "key"
    master.write_bytes(b"m" * 64 + b"\n")
    meta = model.metadata
    async with FakeEngine() as engine, running_gateway(engineKeys={"masterKeyFile": str(master)}) as port:
        api.create(resource("endpointslices"), NAMESPACE, slice_of(put_service(api, model), engine.port))
        request = {"model": meta.name, "messages": [{"role": "user", "content": "hi"}]}
        assert await status_of(port, request, 200) == 200
        wanted = engine_key(b"m" * 64, meta.namespace, meta.name, meta.uid)
        assert engine.seen[-1].headers["authorization"] == f"Bearer {wanted}"
