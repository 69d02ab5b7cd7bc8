"""The manifests in k8s/examples, as a reader would apply them.

Proves: each file says what it is for and holds valid VLLMModels; each renders to a Deployment, or with
several nodes to a LeaderWorkerSet, whose pods ask for the devices it names; no two share a name, and only
the canary's share a served name; every case that a reader looks for is there; no token stands in one; the
demo's model is where the CPU image has it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import helm
from vllm_operator.api.parsing import parse
from vllm_operator.render import render
from vllm_operator.settings import Settings

FILES = sorted((helm.ROOT / "k8s" / "examples").glob("*.yaml"))
BODIES: list[Any] = [body for file in FILES for body in yaml.safe_load_all(file.read_text())]
MODELS = [pytest.param(body, id=body["metadata"]["name"]) for body in BODIES]


def by_name(name: str) -> Any:
    return next(body for body in BODIES if body["metadata"]["name"] == name)


def pod_specs(body: Any) -> list[Any]:
    """Of a Deployment one, of a LeaderWorkerSet the leader's and the workers'."""
    kinds = {"Deployment", "LeaderWorkerSet"}
    (found,) = [m["spec"] for m in render(parse(body), Settings()) if m["kind"] in kinds]
    if "template" in found:
        return [found["template"]["spec"]]
    group = found["leaderWorkerTemplate"]
    return [group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]]


def engines_of(body: Any) -> list[Any]:
    return [c for spec in pod_specs(body) for c in spec["containers"] if c["name"] == "engine"]


def engine_of(body: Any) -> Any:
    (engine,) = engines_of(body)
    return engine


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_explains_itself_and_holds_no_token(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", text)


@pytest.mark.parametrize("body", MODELS)
def test_a_model_is_valid_and_says_how_it_is_called(body: Any) -> None:
    assert list(parse(body).served_names) == body["spec"]["servedNames"]


@pytest.mark.parametrize("body", MODELS)
def test_a_model_asks_for_its_devices(body: Any) -> None:
    gpu, engines = body["spec"]["gpu"], engines_of(body)
    assert len(engines) == min(body["spec"].get("nodes", 1), 2)
    for resources in (engine["resources"] for engine in engines):
        assert resources["requests"] == body["spec"]["resources"]["requests"]
        devices = {key: value for key, value in resources.get("limits", {}).items() if "/" in key}
        resource = gpu.get("resource", "nvidia.com/gpu")
        assert devices == ({resource: str(gpu["count"])} if gpu["count"] else {})


def test_no_two_models_collide() -> None:
    names = Counter(body["metadata"]["name"] for body in BODIES)
    served = Counter(name for body in BODIES for name in body["spec"]["servedNames"])
    assert max(names.values()) == 1
    assert [name for name, count in served.items() if count > 1] == ["chat"]


def test_the_canary_is_two_models_behind_one_name() -> None:
    shares = {b["metadata"]["name"]: b["spec"]["gateway"]["weight"] for b in BODIES if "gateway" in b["spec"]}
    assert shares == {"chat-stable": 95, "chat-next": 5}


def test_every_common_case_is_there() -> None:
    specs = [body["spec"] for body in BODIES]
    assert any(spec["engine"].get("tensorParallelSize") == 4 for spec in specs)
    assert any(spec["gpu"].get("resource", "").startswith("nvidia.com/mig-") for spec in specs)
    assert any(spec["engine"].get("device") == "cpu" and spec["gpu"]["count"] == 0 for spec in specs)
    assert {source for spec in specs for source in spec.get("source", ())} >= {
        "volume",
        "image",
        "huggingFace",
    }
    assert any(spec.get("nodes", 1) > 1 for spec in specs)
    assert any(
        spec["gpu"].get("count") == 1
        and "huggingFace" in spec.get("source", ())
        and "tensorParallelSize" not in spec["engine"]
        for spec in specs
    )
    assert any(spec.get("adapters") for spec in specs)
    assert {"AWQ", "GPTQ"} <= {part for spec in specs for part in spec["model"].split("-")}


@pytest.mark.parametrize("name", ["mistral-7b", "phi-4"])
def test_weights_that_are_mounted_are_read_only(name: str) -> None:
    mounts = engine_of(by_name(name))["volumeMounts"]
    (weights,) = [mount for mount in mounts if mount["mountPath"].startswith("/models")]
    assert weights["readOnly"] is True


def test_the_demo_runs_the_cpu_image_and_its_weights() -> None:
    body = by_name("smollm2")
    assert engine_of(body)["image"] == Settings().images.cpu
    assert body["spec"]["model"] == "/models/smollm2-135m-instruct"
