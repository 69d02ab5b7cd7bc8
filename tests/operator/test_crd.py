"""The CRD is made from the models, and only from what has a structural schema.

Proves: the CRD as text (golden); no default but that of a status that is to come, above all none for
replicas; a maximum on every string, list and map; each CEL rule has a message, and a field that exists; the
converter keeps constraints, and refuses unions, unknown keywords and missing maxima; whatever it lets through
is structural.
Left out: that an API server takes it and what its CEL costs, which needs a real one (tests/e2e).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, create_model

from vllm_operator.api.crd import crd_manifest, structural_schema
from vllm_operator.api.v1alpha1 import COLUMNS, Spec, VLLMModel
from vllm_operator.api.values import FreeForm, Rule, Section
from vllm_operator.errors import SchemaError
from vllm_operator.offline import to_yaml

Json = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "operator" / "crd.yaml"
ALLOWED = {
    "type", "description", "enum", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "items", "minItems", "maxItems", "properties", "required", "additionalProperties", "maxProperties",
    "anyOf",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
}  # fmt: skip


def nodes(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def the_schema() -> Json:
    schema: Json = crd_manifest()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_the_crd_as_text(golden: Callable[[Path, str], None]) -> None:
    golden(GOLDEN, to_yaml([crd_manifest()]))


def test_no_default_is_written_into_stored_objects() -> None:
    """But that of a status which nobody has written yet: it must not look finished to `helm --wait`."""
    assert {path: node["default"] for path, node in nodes(the_schema()) if "default" in node} == {
        ".status": {"observedGeneration": -1}
    }


def test_everything_from_outside_has_a_maximum() -> None:
    for path, node in nodes(the_schema()["properties"]["spec"], "spec"):
        bounded = {
            "string": "maxLength" in node or "enum" in node,
            "array": "maxItems" in node,
            "object": "properties" in node or "maxProperties" in node,
        }
        assert bounded.get(node.get("type", ""), True), path


def test_each_rule_has_a_message_and_a_field_that_exists() -> None:
    found = 0
    for path, node in nodes(the_schema()):
        for rule in node.get("x-kubernetes-validations", ()):
            found += 1
            assert rule["message"], path
            inner = node
            for part in filter(None, rule.get("fieldPath", "").split(".")):
                inner = inner["properties"][part]
    assert found >= len(VLLMModel.rules) + len(Spec.rules) + 15


def test_columns_and_subresources_point_at_fields() -> None:
    fields = {path for path, _ in nodes(the_schema())} | {".metadata.creationTimestamp"}
    for column in COLUMNS:
        assert column.path.split("[")[0] in fields
    for path in crd_manifest()["spec"]["versions"][0]["subresources"]["scale"].values():
        assert path in fields


def made(annotation: Any, default: Any = ..., **field: Any) -> Json:
    model = create_model("Made", __base__=Section, value=(annotation, Field(default, **field)))
    value: Json = structural_schema(model)["properties"]["value"]
    return value


@pytest.mark.parametrize(
    ("annotation", "what"),
    [
        (str, "max_length"),
        (tuple[int, ...], "max_length"),
        (dict[str, int], "max_length"),
        (Annotated[dict[str, Any], Field(max_length=3)], "preserve-unknown-fields"),
        (int | bool, "union of 2"),
        (Any, "type None"),
        (Annotated[int, Field(gt=3)], "exclusiveMinimum"),
        (Annotated[int, Field(multiple_of=2)], "multipleOf"),
        (Annotated[tuple[int, int], Field(max_length=2)], "prefixItems"),
        (None, "null"),
    ],
)
def test_what_an_api_server_would_refuse_is_refused_here(annotation: Any, what: str) -> None:
    with pytest.raises(SchemaError, match=what):
        made(annotation)


def test_optional_enum_and_free_form_fields() -> None:
    assert made(Annotated[int, Field(ge=1, le=3)] | None, None) == {
        "type": "integer",
        "minimum": 1,
        "maximum": 3,
    }
    assert made(Literal["a", "b"]) == {"type": "string", "enum": ["a", "b"]}
    assert made(Literal["a"]) == {"type": "string", "enum": ["a"]}
    assert made(FreeForm)["x-kubernetes-preserve-unknown-fields"] is True


def test_rules_stand_on_the_object_that_they_judge() -> None:
    class Inner(Section):
        x: int
        rules = (Rule("self.x > 0", "must be positive", lambda inner: inner.x > 0, ".x"),)

    class Outer(Section):
        one: Inner
        many: tuple[Inner, ...] = Field((), max_length=2)

    schema = structural_schema(Outer)
    rule = {"rule": "self.x > 0", "message": "must be positive", "fieldPath": ".x"}
    assert schema["properties"]["one"]["x-kubernetes-validations"] == [rule]
    assert schema["properties"]["many"]["items"]["x-kubernetes-validations"] == [rule]


def section_with(fields: dict[str, Any]) -> type[Section]:
    values: dict[str, Any] = {name: (annotation, ...) for name, annotation in fields.items()}
    return create_model("Inner", __base__=Section, **values)


scalars: st.SearchStrategy[Any] = st.sampled_from(
    [
        int,
        float,
        bool,
        Literal["a", "b"],
        Annotated[str, Field(max_length=9)],
        Annotated[int, Field(ge=0, le=9)],
    ]
)
field_types: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(
        inner.map(lambda kind: Annotated[types.GenericAlias(tuple, (kind, ...)), Field(max_length=5)]),
        inner.map(lambda kind: Annotated[types.GenericAlias(dict, (str, kind)), Field(max_length=5)]),
        inner.map(lambda kind: kind | None if not hasattr(kind, "__metadata__") else kind),
        st.dictionaries(st.sampled_from(["one", "two_words", "three"]), inner, min_size=1).map(section_with),
    ),
    max_leaves=8,
)


@given(field_types)
def test_what_the_converter_lets_through_is_structural(annotation: Any) -> None:
    for path, node in nodes(made(annotation)):
        assert set(node) <= ALLOWED, path
        assert node["type"] in ("string", "integer", "number", "boolean", "array", "object"), path
        assert ("items" in node) == (node["type"] == "array"), path
        assert not ("properties" in node and "additionalProperties" in node), path
