"""Weights on a real cluster: a LoRA adapter, a prefetch, and fields that other objects carry.

Proves: a model and an adapter on a claim are served by a real vLLM, the adapter under its name, with other
answers, and granted in the status; the prefetch Job runs in the engine's image and within Pod Security
"restricted", its failure is the model's reason, and no engine is started before it is done; what an edit
takes out of a model goes from its Deployment; several nodes are a group, or say how to get the API.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import cluster
import httpx
import pytest

CLAIM, WRITER = "e2e-weights", "e2e-weights"
FOLDER = "/var/tmp/vllm-fleet-e2e-weights"
# A LoRA adapter for SmolLM2-135M that bends its first attention layers, so that its answers are others.
WRITE_ADAPTER = """
import json, os, pathlib, shutil, signal, torch
from safetensors.torch import save_file
os.chmod("/claim", 0o777)
folder = pathlib.Path("/claim/bent")
folder.mkdir(exist_ok=True)
config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": ["q_proj"], "bias": "none"}
folder.joinpath("adapter_config.json").write_text(json.dumps(config))
torch.manual_seed(1)
name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
shapes = {"A": (32, 576), "B": (576, 32)}
save_file({name.format(layer, side): torch.randn(*shape)
           for layer in range(8) for side, shape in shapes.items()}, folder / "adapter_model.safetensors")
shutil.copytree("/models/smollm2-135m-instruct", "/claim/smollm2", dirs_exist_ok=True)
for file in folder.iterdir():
    file.chmod(0o644)
pathlib.Path("/claim/written").touch()
signal.sigwait({signal.SIGTERM})
"""


def model(name: str, **spec: Any) -> cluster.Manifest:
    manifest = cluster.example("smollm2.yaml")
    manifest["metadata"]["name"] = name
    small = {"servedNames": [name], "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}}
    manifest["spec"] |= small | spec
    return manifest


@pytest.fixture(scope="module")
def claim(release: None) -> Iterator[str]:
    """A claim on a folder of the node, with an adapter in `bent`."""
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "e2e-none",
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": FOLDER, "type": "DirectoryOrCreate"},
    }
    asked = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "e2e-none",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    container = {
        "name": "writer",
        "image": "vllm-fleet/vllm-cpu:0.32.0",
        "command": ["python3", "-c", WRITE_ADAPTER],
        "securityContext": {"runAsUser": 0},
        "volumeMounts": [{"name": "claim", "mountPath": "/claim"}],
        "readinessProbe": {"exec": {"command": ["test", "-e", "/claim/written"]}, "periodSeconds": 1},
    }
    pod = {
        "containers": [container],
        "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": CLAIM}}],
        "terminationGracePeriodSeconds": 1,
    }
    for kind, name, body in (
        ("PersistentVolume", CLAIM, volume),
        ("PersistentVolumeClaim", CLAIM, asked),
        ("Pod", WRITER, pod),
    ):
        cluster.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": body})
    cluster.kubectl("wait", "pod", WRITER, "--for=condition=Ready", "--timeout=300s")
    yield CLAIM
    cluster.kubectl("exec", WRITER, "--", "sh", "-c", "rm -rf /claim/*")
    for kind in ("pod", "persistentvolumeclaim", "persistentvolume"):
        cluster.delete(kind, CLAIM)


@pytest.fixture
def other() -> Iterator[str]:
    yield "other"
    cluster.remove_model("other")


def engine_key(pod: cluster.Manifest) -> str:
    """What the gateway would send; empty where engines ask for none."""
    variables = pod["spec"]["containers"][0]["env"]
    for found in (item for item in variables if item["name"] == "VLLM_API_KEY"):
        reference = found["valueFrom"]["secretKeyRef"]
        secret = cluster.get("secret", reference["name"]) or {}
        return base64.b64decode(secret["data"][reference["key"]]).decode()
    return ""


def said(port: int, name: str, key: str) -> str:
    body = {"model": name, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{port}/v1/completions"
    answer = httpx.post(url, json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return str(answer.json()["choices"][0]["text"])


def test_a_model_and_an_adapter_on_a_claim_are_served_by_name(claim: str, other: str) -> None:
    weights, bent = ({"volume": {"claimName": claim, "path": path}} for path in ("smollm2", "bent"))
    spec = model(other, source=weights, adapters=[{"name": "bent", "source": bent}])
    spec["spec"]["engine"] = spec["spec"].get("engine", {}) | {"device": "cpu", "maxLoraRank": 32}
    spec["spec"]["gpu"] = {"count": 0}
    cluster.apply(spec)
    cluster.wait_settled(other)
    assert (cluster.get("vllm", other) or {})["status"]["adapters"] == ["bent"]
    (pod,) = cluster.engine_pods(other)
    with cluster.port_forward(f"pod/{pod['metadata']['name']}", 8000, "default") as port:
        straight, bowed = (said(port, name, engine_key(pod)) for name in (other, "bent"))
    assert straight != bowed


def prefetch_job(name: str) -> cluster.Manifest:
    found = cluster.items("jobs", f"vllm-fleet.dev/model={name}")
    return found[0] if found else {}


def test_a_prefetch_that_fails_is_the_models_reason(claim: str, other: str) -> None:
    cache = {"claimName": claim, "prefetch": True}
    hub: cluster.Manifest = {"model": "vllm-fleet/no-such-model", "source": {"huggingFace": {}}}
    cluster.apply(model(other, **hub, cache=cache, engine={"device": "cpu"}, gpu={"count": 0}))

    def reason() -> str:
        """Of the Hub, where there is a way to it; else of the network."""
        found = cluster.condition(other, "Ready")
        words = ("Hugging Face has no vllm-fleet/no-such-model", "failed and is tried again")
        return str(found["reason"]) if any(text in found.get("message", "") for text in words) else ""

    assert cluster.eventually(reason, "the failure in the condition", 300) in (
        "DownloadFailed",
        "Downloading",
    )
    assert not cluster.items("deployments", f"vllm-fleet.dev/model={other}")
    template = prefetch_job(other)["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    cluster.kubectl(
        *("-n", cluster.SYSTEM_NAMESPACE, "create", "--dry-run=server", "-f", "-"), stdin=json.dumps(pod)
    )


def test_what_an_edit_takes_out_goes_from_the_deployment(release: None, other: str) -> None:
    cluster.apply(model(other, replicas=0, scheduling={"nodeSelector": {"kubernetes.io/os": "linux"}}))
    name = f"{other}-engine"
    found = cluster.eventually(lambda: cluster.get("deployment", name), "it is there", 60)
    assert found["spec"]["template"]["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux"}
    cluster.patch_spec(other, {"scheduling": None})
    cluster.eventually(
        lambda: "nodeSelector" not in (cluster.get("deployment", name) or {})["spec"]["template"]["spec"],
        "the selector is gone",
        60,
    )


def test_several_nodes_are_a_group_or_say_how_to_get_the_api(release: None, other: str) -> None:
    kind = ("get", "leaderworkersets", "-o", "name")
    served = cluster.run(cluster.tool("kubectl"), *kind, check=False).returncode == 0
    cluster.apply(model(other, nodes=2, engine={"tensorParallelSize": 2}, gpu={"count": 1}))
    wanted = "Accepted" if served else "MissingAPI"
    cluster.eventually(
        lambda: cluster.condition(other, "Accepted").get("reason") == wanted, f"it is {wanted}", 60
    )
    if served:
        assert cluster.get("leaderworkerset", f"{other}-nodes")
    else:
        assert "lws.sigs.k8s.io" in cluster.condition(other, "Accepted")["message"]
