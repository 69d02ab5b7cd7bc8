"""A prefetch on a real cluster, from a Hub in it: what a person with a mirror goes through.

Proves: HF_ENDPOINT in engine.env and the token reach the Job, whose pod binds the claim; until the weights
are there the status says how much is to come, and no engine exists; the engine then starts and answers
through the gateway, and asks the Hub for nothing; a rollout downloads nothing; a gated model says that its
token is missing, and goes on by itself when it is given one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import httpx
import pytest
from streams import wait_routed

HUB, CLASS = "e2e-hub", "e2e-hub"
FOLDER = "/var/tmp/vllm-fleet-e2e-hub"
VOLUMES = ("e2e-hub-a", "e2e-hub-b")
PROGRAM = Path(__file__).parents[1] / "fakes" / "hub_server.py"
WEIGHTS = "/models/smollm2-135m-instruct"
ENDPOINT, CDN = (
    f"http://{HUB}.default",
    f"http://{HUB}.default.svc",
)  # two hosts, as the Hub and its store are
REPOS = {
    "cdn": CDN,
    "tokens": {"hf_endToEnd": {"repos": ["acme/small", "acme/gated"]}},
    "repos": {
        "acme/small": {
            "folder": WEIGHTS,
            "add": {"pytorch_model.bin": "not wanted", "original/params.json": "{}"},
            "revisions": ["main", "v1"],
            "private": True,
        },
        "acme/gated": {"folder": "/hub", "gated": True},
    },
}


def core(kind: str, name: str, **body: Any) -> cluster.Manifest:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "labels": {"app": HUB}}, **body}


def hub_pod() -> cluster.Manifest:
    """Root, since the folder of a hostPath volume is."""
    folders = " ".join(f"/node/{name}" for name in VOLUMES)
    command = f"mkdir -p {folders} && chmod 777 {folders} && exec python3 /hub/hub_server.py /hub/repos.json"
    container = {
        "name": "hub",
        "image": "vllm-fleet/vllm-cpu:0.32.0",
        "command": ["sh", "-c", command],
        "securityContext": {"runAsUser": 0},
        "volumeMounts": [{"name": "hub", "mountPath": "/hub"}, {"name": "node", "mountPath": "/node"}],
        "readinessProbe": {"httpGet": {"path": "/-/requests", "port": 8000}, "periodSeconds": 1},
    }
    volumes = [
        {"name": "hub", "configMap": {"name": HUB}},
        {"name": "node", "hostPath": {"path": FOLDER, "type": "DirectoryOrCreate"}},
    ]
    return {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 1}


def volume(name: str) -> cluster.Manifest:
    return core(
        "PersistentVolume",
        name,
        spec={
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": f"{FOLDER}/{name}", "type": "DirectoryOrCreate"},
        },
    )


def storage_class() -> cluster.Manifest:
    """Of volumes that are made by hand, and bound when the first pod wants one."""
    manual = {"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}
    return {**core("StorageClass", CLASS), "apiVersion": "storage.k8s.io/v1", **manual}


class Hub:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/-"

    def asked(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self._url}/requests", timeout=60).json())

    def large(self) -> list[str]:
        paths = [asked["path"] for asked in self.asked() if asked["method"] == "GET"]
        return [path.rsplit("/", 1)[1] for path in paths if path.startswith("/cdn/")]

    def be_slow(self) -> None:
        httpx.put(f"{self._url}/slow", timeout=60).raise_for_status()

    def go_on(self) -> None:
        httpx.delete(f"{self._url}/slow", timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def hub(release: None) -> Iterator[Hub]:
    data = {"hub_server.py": PROGRAM.read_text(), "repos.json": json.dumps(REPOS)}
    port = {"port": 80, "targetPort": 8000}
    made = (
        core("ConfigMap", HUB, data=data),
        core("Secret", HUB, stringData={"token": "hf_endToEnd"}),
        core("Service", HUB, spec={"selector": {"app": HUB}, "ports": [port]}),
        core("Pod", HUB, spec=hub_pod()),
        storage_class(),
        *map(volume, VOLUMES),
    )
    cluster.apply({"apiVersion": "v1", "kind": "List", "items": list(made)})
    try:
        cluster.kubectl("wait", "pod", HUB, "--for=condition=Ready", "--timeout=300s")
        cluster.eventually(names_lead_to_it, "pods reach it by its names", 60)
        with cluster.port_forward(f"pod/{HUB}", 8000, "default") as local:
            yield Hub(local)
        cluster.kubectl("exec", HUB, "--", "sh", "-c", "rm -rf /node/*")
    finally:
        for item in reversed(made):
            cluster.delete(item["kind"], item["metadata"]["name"])


def names_lead_to_it() -> bool:
    """DNS and kube-proxy hear of a Service and its endpoints after kubectl does."""
    ask = (
        "import sys, urllib.request as u; [u.urlopen(f'{url}/-/requests', timeout=5) for url in sys.argv[1:]]"
    )
    command = (cluster.tool("kubectl"), "exec", HUB, "--", "python3", "-c", ask, ENDPOINT, CDN)
    return cluster.run(*command, check=False).returncode == 0


@pytest.fixture
def fetched(hub: Hub) -> Iterator[str]:
    yield "fetched"
    cluster.remove_model("fetched")


@pytest.fixture
def gated(hub: Hub) -> Iterator[str]:
    yield "gated"
    cluster.remove_model("gated")


def model(name: str, repo: str, **source: Any) -> cluster.Manifest:
    """The demo's model from the Hub."""
    manifest = cluster.example("smollm2.yaml")
    manifest["metadata"]["name"] = name
    mirror = {"name": "HF_ENDPOINT", "value": ENDPOINT}
    manifest["spec"] |= {
        "model": repo,
        "servedNames": [name],
        "source": {"huggingFace": source},
        "cache": {"size": "1Gi", "storageClassName": CLASS, "prefetch": True},
        "gpu": {"count": 0},
        "resources": {"requests": {"cpu": "300m", "memory": "1Gi"}},
    }
    manifest["spec"]["engine"]["env"].append(mirror)
    return manifest


def job_of(name: str) -> cluster.Manifest:
    (job,) = cluster.items("jobs", f"vllm-fleet.dev/model={name}")
    return job


def is_complete(job: cluster.Manifest) -> bool:
    said = job["status"].get("conditions", ())
    return any((c["type"], c["status"]) == ("Complete", "True") for c in said)


def told(name: str, reason: str, words: str) -> str:
    """The message of Ready, once it has the reason and the words."""
    found = cluster.condition(name, "Ready")
    fits = found.get("reason") == reason and words in found["message"]
    return str(found["message"]) if fits else ""


def answer(name: str) -> str:
    """To a chat, through the gateway."""
    body = {"message": "What is the capital of France?", "model": f"default/{name}", "temperature": 0}
    with cluster.port_forward("svc/vllm-fleet-gateway", 3000) as port:
        wait_routed(port, f"default/{name}")
        found = httpx.post(f"http://127.0.0.1:{port}/chat", json={**body, "max_tokens": 16}, timeout=60)
    assert found.status_code == 200, found.text
    return str(found.json()["response"])


def test_weights_are_fetched_once_and_the_engine_starts_without_the_hub(hub: Hub, fetched: str) -> None:
    hub.be_slow()
    cluster.apply(model(fetched, "acme/small", revision="v1", tokenSecret={"name": HUB}))
    message = cluster.eventually(
        lambda: told(fetched, "Downloading", " files since "), "the download is told", 180, 0.1
    )
    assert message.startswith("0.3 GB in ")
    assert cluster.condition(fetched, "Reconciling")["reason"] == "Downloading"
    assert not cluster.items("deployments", f"vllm-fleet.dev/model={fetched}")
    assert (cluster.get("pvc", f"{fetched}-cache") or {})["status"]["phase"] == "Bound"
    hub.go_on()
    cluster.eventually(lambda: is_complete(job_of(fetched)), "the Job is done", 180, 0.1)
    asked = hub.asked()
    assert hub.large() == ["model.safetensors"]
    assert all(item["with_token"] for item in asked if not item["path"].startswith("/cdn/"))

    cluster.wait_settled(fetched)
    (before,) = cluster.engine_pods(fetched)
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in before["spec"]["containers"][0]["env"]
    assert "Paris" in answer(fetched)
    job = job_of(fetched)

    cluster.patch_spec(fetched, {"engine": {"maxModelLen": 1024}})
    cluster.wait_settled(fetched)
    (after,) = cluster.engine_pods(fetched)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert job_of(fetched) == job
    assert hub.asked() == asked


def test_a_gated_model_says_that_its_token_is_missing_and_goes_on_with_one(gated: str) -> None:
    cluster.apply(model(gated, "acme/gated"))
    words = "refuses acme/gated without a token; its terms must be accepted there; check source.huggingFace."
    message = cluster.eventually(lambda: told(gated, "ModelAccessDenied", words), "the refusal is told", 180)
    assert message.startswith(f"{HUB}.default (HF_ENDPOINT) ")
    assert cluster.condition(gated, "Stalled")["reason"] == "ModelAccessDenied"
    cluster.patch_spec(gated, {"source": {"huggingFace": {"tokenSecret": {"name": HUB}}}})
    cluster.eventually(lambda: cluster.engine_pods(gated), "it was fetched, and an engine starts", 180)
