"""The generator and the files that it owns.

Proves: every generated file is what its sources make it (so `make verify` passes); a stale, a missing and
an orphaned file are named; the definition's braces survive Helm; k8s/install.yaml holds what the chart
renders and no trace of Helm; a value without a comment is noticed; Pydantic's schemas are made plain, and
readable.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

import chart_files
import chart_values
import generate
import helm
import json_schema
from vllm_operator.api.crd import crd_manifest

CRD_TEMPLATE = Path("charts/vllm-fleet/templates/crds/vllmmodels.yaml")


@pytest.fixture(scope="module")
def files() -> chart_files.Files:
    return generate.generate()


def test_nothing_is_stale() -> None:
    command = [sys.executable, "hack/generate.py", "--check"]
    done = subprocess.run(command, cwd=helm.ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_stale_missing_and_orphaned_files_are_named(files: chart_files.Files) -> None:
    dashboard = Path("charts/vllm-fleet/dashboards/overview.json")
    changed = files | {CRD_TEMPLATE: files[CRD_TEMPLATE] + "#", Path("docs/reference/new.md"): "new"}
    del changed[dashboard]
    assert list(generate.stale(changed)) == [CRD_TEMPLATE, Path("docs/reference/new.md"), dashboard]


def test_the_definition_comes_through_helm_unchanged(render: Any) -> None:
    (rendered,) = [m for m in render() if m["kind"] == "CustomResourceDefinition"]
    assert rendered["spec"] == crd_manifest()["spec"]


def test_braces_in_the_definition_are_not_helms(tmp_path: Path) -> None:
    crd = crd_manifest()
    crd["spec"]["names"]["categories"] = ["{{ .Values.oops }}"]
    chart_files.write(tmp_path, chart_files.crd_template(crd))
    text = (tmp_path / CRD_TEMPLATE).read_text()
    assert '{{ "{{" }} .Values.oops }}' in text


def test_install_manifest_is_the_chart_without_helm(render: Any) -> None:
    text = (helm.ROOT / "k8s" / "install.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    installed = {(m["kind"], m["metadata"]["name"]) for m in documents}
    rendered = {
        (m["kind"], m["metadata"]["name"])
        for m in render({}, helm.Release())
        if "helm.sh/hook" not in m["metadata"].get("annotations", {})
    }
    assert installed == rendered | {("Namespace", "vllm-fleet")}
    assert documents[0]["kind"] == "Namespace"
    assert "Helm" not in text.split("---", 1)[1]
    assert "helm.sh/" not in text


def test_a_value_without_a_comment_is_noticed() -> None:
    with pytest.raises(chart_values.Undocumented, match=r"values\.yaml:5: a\.c has no comment"):
        chart_values.read_values("# A.\na:\n  # B.\n  b: 1\n  c: 2\n")


def test_a_comment_and_its_annotation_make_a_schema() -> None:
    text = "# How many,\n# at most.\n# @schema {minimum: 0}\nsize: 1\n\n# Words.\nwords: []\n"
    schema = chart_values.values_schema(chart_values.read_values(text), {}, {})
    assert schema["properties"]["size"] == {
        "description": "How many, at most.",
        "type": "integer",
        "minimum": 0,
    }
    assert schema["properties"]["words"] == {"description": "Words.", "type": "array"}
    assert schema["additionalProperties"] is False


class Inner(BaseModel):
    """A part."""

    title: str = "x"
    size: int | None = Field(None, ge=1, le=9, description="How\nmany.")


class Outer(BaseModel):
    inner: Inner = Field(Inner(), description="One.")
    inners: list[Inner] = []
    names: dict[str, int] = {}


def test_schemas_are_made_plain() -> None:
    schema = json_schema.settings_schema(Outer)
    assert "$ref" not in str(schema)
    assert schema["properties"]["inner"]["description"] == "One."
    assert {row.path: row.type for row in json_schema.rows(schema)} == {
        "inner": "object",
        "inner.title": "string",
        "inner.size": "integer, 1 to 9",
        "inners": "list of object",
        "inners[].title": "string",
        "inners[].size": "integer, 1 to 9",
        "names": "map of integer",
    }
    assert (
        next(row for row in json_schema.rows(schema) if row.path == "inner.size").description == "How many."
    )
