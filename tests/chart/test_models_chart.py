"""The chart vllm-models: VLLMModels from values.

Proves: each entry becomes one VLLMModel whose spec is the entry, number for number; what the README shows is
valid for chart, operator and `helm lint --strict`; the schema is the definition's: it takes every example and
refuses unknown fields, wrong types and names, by their path; every value has its effect; keep keeps; without
models nothing is rendered, and the notes say so.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

import chart_values
import helm
import json_schema
from vllm_operator.api.parsing import parse

Values = dict[str, Any]
RELEASE = helm.Release(name="models", namespace="team-a")
README = (helm.MODELS_CHART / "README.md").read_text()
EXAMPLES = [
    body
    for file in sorted((helm.ROOT / "k8s" / "examples").glob("*.yaml"))
    for body in yaml.safe_load_all(file.read_text())
]


@pytest.fixture(scope="module")
def models_chart() -> helm.Helm:
    return helm.find_helm(helm.MODELS_CHART)


def rendered(chart: helm.Helm, values: Values) -> list[helm.Manifest]:
    return helm.manifests(chart.template(values, RELEASE))


def readme_values() -> Values:
    found = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert found
    return dict(yaml.safe_load(found[1]))


def test_the_readme_is_valid(models_chart: helm.Helm) -> None:
    values = readme_values()
    assert models_chart.lint(values) == []
    models = {m["metadata"]["name"]: m for m in rendered(models_chart, values)}
    assert models.keys() == values["models"].keys()
    for name, manifest in models.items():
        assert manifest["spec"] == values["models"][name]
        assert manifest["metadata"]["namespace"] == "team-a"
        assert parse(manifest).served_names == (name,)


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body["metadata"]["name"])
def test_every_example_passes(models_chart: helm.Helm, body: Values) -> None:
    (manifest,) = rendered(models_chart, {"models": {body["metadata"]["name"]: body["spec"]}})
    assert manifest["spec"] == body["spec"]


def test_large_numbers_stay_numbers(models_chart: helm.Helm) -> None:
    spec = {"model": "a/b", "engine": {"maxModelLen": 1048576, "gpuMemoryUtilization": 0.85}}
    (manifest,) = rendered(models_chart, {"models": {"m": spec}})
    assert manifest["spec"] == spec


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"m": {"model": "a/b", "engin": {}}}, "'/models/m'.*'engin'"),
        ({"m": {"model": "a/b", "engine": {"maxModelLen": "8k"}}}, "'/models/m/engine/maxModelLen'"),
        ({"m": {"engine": {}}}, "'/models/m'.*'model'"),
        ({"m": {"model": "a/b", "gpu": {"count": -1}}}, "'/models/m/gpu/count'"),
        ({"Big_Name": {"model": "a/b"}}, "Big_Name"),
        ({"m": None, "n": "a/b"}, "'/models/n'"),
    ],
)
def test_wrong_models_are_refused_by_path(models_chart: helm.Helm, models: Values, words: str) -> None:
    with pytest.raises(helm.HelmError, match=words):
        rendered(models_chart, {"models": models})


def test_labels_annotations_and_keep(models_chart: helm.Helm) -> None:
    values = {
        "models": {"m": {"model": "a/b"}},
        "keep": True,
        "commonLabels": {"team": "ml"},
        "commonAnnotations": {"vllm-fleet.dev/paused": "true"},
    }
    (manifest,) = rendered(models_chart, values)
    assert (
        manifest["metadata"]["labels"].items()
        >= {"team": "ml", "app.kubernetes.io/instance": "models"}.items()
    )
    assert manifest["metadata"]["annotations"] == {
        "helm.sh/resource-policy": "keep",
        "vllm-fleet.dev/paused": "true",
    }
    (plain,) = rendered(models_chart, {"models": {"m": {"model": "a/b"}}})
    assert "annotations" not in plain["metadata"]


def test_every_value_is_known_to_this_test() -> None:
    tree = chart_values.read_values((helm.MODELS_CHART / "values.yaml").read_text())
    assert {value.path for value in tree} == {"models", "keep", "commonLabels", "commonAnnotations"}


def test_notes_say_what_was_applied(models_chart: helm.Helm) -> None:
    assert "llama-8b, qwen-32b" in models_chart.notes(readme_values(), RELEASE)
    assert "nothing was applied" in models_chart.notes({}, RELEASE)
    assert rendered(models_chart, {}) == []


def test_structural_schemas_become_json_schema() -> None:
    structural = {
        "type": "object",
        "properties": {
            "size": {"x-kubernetes-int-or-string": True},
            "x-field": {"type": "string"},
            "any": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
        },
        "x-kubernetes-validations": [{"rule": "true"}],
    }
    assert json_schema.plain_json_schema(structural) == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "size": {"type": ["integer", "string"]},
            "x-field": {"type": "string"},
            "any": {"type": "object", "properties": {}},
        },
    }
