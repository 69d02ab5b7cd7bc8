"""The manifests in k8s/examples, as a reader would apply them.

Proves: each is one valid VLLMModel whose file says what it is for; each renders to a Deployment that asks
for the GPUs it names; no two share a name; no token stands in one; short names are granted without a
conflict; the demo's model is where the CPU image has it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import helm
from vllm_operator.api.parsing import parse
from vllm_operator.render import render
from vllm_operator.settings import Settings

FILES = sorted((helm.ROOT / "k8s" / "examples").glob("*.yaml"))
BODIES = {file.name: yaml.safe_load(file.read_text()) for file in FILES}


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def deployment(body: dict[str, Any]) -> dict[str, Any]:
    (found,) = [m for m in render(parse(body), Settings()) if m["kind"] == "Deployment"]
    return dict(found)


def test_an_example_is_valid_and_explains_itself(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    assert len(list(yaml.safe_load_all(text))) == 1
    assert parse(BODIES[file.name]).served_names


def test_an_example_asks_for_its_gpus(file: Path) -> None:
    spec = BODIES[file.name]["spec"]
    (engine,) = deployment(BODIES[file.name])["spec"]["template"]["spec"]["containers"]
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == str(spec["gpu"]["count"])
    assert engine["resources"]["requests"] == spec["resources"]["requests"]


def test_no_two_examples_collide() -> None:
    names = [body["metadata"]["name"] for body in BODIES.values()]
    served = [name for body in BODIES.values() for name in body["spec"]["servedNames"]]
    assert len(names) == len(set(names))
    assert len(served) == len(set(served))


def test_no_example_holds_a_token(file: Path) -> None:
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", file.read_text())


def test_the_demo_runs_the_cpu_image_and_its_weights() -> None:
    body = BODIES["smollm2.yaml"]
    (engine,) = deployment(body)["spec"]["template"]["spec"]["containers"]
    assert engine["image"] == Settings().images.cpu
    assert body["spec"]["model"] == "/models/smollm2-135m-instruct"
