"""Reads values.yaml as its own documentation: every key with its comment, and what a `@schema` line adds to
its type.

From the same tree come values.schema.json and docs/reference/values.md, so neither can disagree with the
values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Schema = dict[str, Any]
ANNOTATION = re.compile(r"@schema (.+)")
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}

STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}

# Types of Kubernetes that several values share. Those with many fields stay open: the API server checks them.
DEFINITIONS: Schema = {
    "labels": STRINGS,
    "object": {"type": "object"},
    "objects": {"type": "array", "items": {"type": "object"}},
    "namespaces": {
        "type": "array",
        "uniqueItems": True,
        "items": {"type": "string", "pattern": NAME, "maxLength": 63},
    },
    "objectReferences": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
            "additionalProperties": False,
        },
    },
    "resources": {
        "type": "object",
        "properties": {"requests": QUANTITIES, "limits": QUANTITIES, "claims": {"type": "array"}},
        "additionalProperties": False,
    },
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    # https://gateway-api.sigs.k8s.io/geps/gep-2257/
    "routeDuration": {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"},
    "promDuration": {"type": "string", "pattern": "^(([0-9]+(ms|[smhdwy]))+)?$"},
}

# Set by Helm and by the parent where this chart is a dependency; not read by it.
AS_DEPENDENCY: Schema = {
    "global": {"type": "object", "description": "Values of a parent chart; not read."},
    "enabled": {
        "type": "boolean",
        "description": "For the `condition` of a parent chart's dependency; not read.",
    },
}


class Undocumented(Exception):
    """A key of values.yaml has no comment above it."""


@dataclass(frozen=True)
class Value:
    """A key of values.yaml: dotted path, its comment as one paragraph, its annotation, the keys below it."""

    path: str
    description: str
    default: Any
    annotation: Schema
    children: tuple[Value, ...] = ()

    def walk(self) -> Iterator[Value]:
        yield self
        for child in self.children:
            yield from child.walk()


def read_values(text: str) -> tuple[Value, ...]:
    """The documented keys of a values.yaml, in its order."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return _children(root, yaml.safe_load(text), text.splitlines(), "")


def _children(
    node: yaml.MappingNode, data: Mapping[str, Any], lines: list[str], prefix: str
) -> tuple[Value, ...]:
    return tuple(_value(key, value, data, lines, prefix) for key, value in node.value)


def _value(key: yaml.Node, node: yaml.Node, data: Mapping[str, Any], lines: list[str], prefix: str) -> Value:
    assert isinstance(key, yaml.ScalarNode)
    path = f"{prefix}{key.value}"
    description, annotation = _comment(lines, key.start_mark.line)
    if not description:
        raise Undocumented(f"values.yaml:{key.start_mark.line + 1}: {path} has no comment")
    default = data[key.value]
    # An annotated mapping is a value as a whole; its inside belongs to Kubernetes or to a settings file.
    nested = isinstance(node, yaml.MappingNode) and node.value and not annotation
    children = _children(node, default, lines, f"{path}.") if nested else ()  # type: ignore[arg-type]
    return Value(path, description, default, annotation, children)


def _comment(lines: list[str], line: int) -> tuple[str, Schema]:
    """The comment block that ends right above a line: its prose, and its `@schema` mapping."""
    block: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].strip().lstrip("# "))
    annotation: Schema = {}
    for text in block:
        if found := ANNOTATION.fullmatch(text):
            annotation |= yaml.safe_load(found[1])
    return " ".join(text for text in block if not ANNOTATION.fullmatch(text)), annotation


def values_schema(values: tuple[Value, ...], definitions: Schema, moved: Mapping[str, str]) -> Schema:
    """Unknown keys are refused; those of `moved` pass, since the chart has advice on them."""
    schema: Schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_object(values),
        "$defs": DEFINITIONS | copy.deepcopy(definitions),
    }
    schema["properties"] |= AS_DEPENDENCY
    for path in moved:
        _admit(schema, schema, path.split("."))
    return schema


def _object(values: tuple[Value, ...]) -> Schema:
    properties = {value.path.rpartition(".")[2]: _schema_of(value) for value in values}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema_of(value: Value) -> Schema:
    described = {"description": value.description}
    if value.children:
        return described | _object(value.children)
    typed = {} if {"$ref", "enum"} & value.annotation.keys() else {"type": JSON_TYPES[type(value.default)]}
    return described | typed | value.annotation


def _admit(root: Schema, schema: Schema, path: list[str]) -> None:
    """Lets any value pass at a path that the chart itself refuses with advice."""
    if reference := schema.get("$ref"):
        schema = root["$defs"][reference.rpartition("/")[2]]
    properties = schema.setdefault("properties", {})
    if len(path) == 1:
        properties[path[0]] = {"description": "Not a value: setting it fails with advice."}
    else:
        _admit(root, properties[path[0]], path[1:])
