"""Pydantic's JSON schemas, made plain: no references, no titles, no `null` as an optional field's type.

The chart's schema and the reference pages both read this form. Kubernetes' structural schemas are turned into
JSON Schema here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]
DURATIONS = ("^([0-9]+(h|m|s|ms))+$", "^([0-9]+(h|ms|m|s))+$")


def settings_schema(model: type[BaseModel]) -> Schema:
    """The schema of a settings file, by the names that the file uses."""
    schema = model.model_json_schema(by_alias=True)
    plain = _plain(schema, schema.pop("$defs", {}))
    assert isinstance(plain, dict)
    return plain


def plain_json_schema(node: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema: unknown fields refused, quantities as both of their
    types. Rules in CEL have no counterpart and are left to the API server.
    """
    if isinstance(node, list):
        return [plain_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: plain_json_schema(value) for key, value in node.items() if not key.startswith("x-")}
    if "properties" in node:  # a field may be called x-…
        plain["properties"] = {key: plain_json_schema(value) for key, value in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            plain["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        plain["type"] = ["integer", "string"]
    return plain


def _plain(node: Any, definitions: Schema) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if reference := node.get("$ref"):
        # What stands beside a reference (this field's own description) beats what it refers to.
        node = definitions[reference.rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
    if "anyOf" in node:
        (node,) = (node | option for option in node["anyOf"] if option != {"type": "null"})
    dropped = {"title", "anyOf"} | ({"default"} if node.get("default", "") is None else set())
    plain = {key: _plain(value, definitions) for key, value in node.items() if key not in dropped}
    if "properties" in node:  # a field may be called `title`
        plain["properties"] = {key: _plain(value, definitions) for key, value in node["properties"].items()}
    if "description" in plain:
        plain["description"] = " ".join(plain["description"].split())
    return plain


@dataclass(frozen=True)
class Row:
    """A field of a schema, by its dotted path; `[]` marks what lies in a list."""

    path: str
    schema: Schema
    required: bool

    @property
    def description(self) -> str:
        """As Markdown in a table's cell."""
        return escape(str(self.schema.get("description", "")))

    @property
    def type(self) -> str:
        """For people: `string`, `integer, 1 to 10`, `list of string`, or the choices."""
        return type_name(self.schema)


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def rows(schema: Schema, prefix: str = "") -> Iterator[Row]:
    """Every field below a schema, each parent before its children."""
    for name, child in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield Row(path, child, name in schema.get("required", ()))
        if child.get("type") == "array":
            yield from rows(child.get("items", {}), f"{path}[].")
        else:
            yield from rows(child, f"{path}.")


def type_name(schema: Schema) -> str:
    if choices := schema.get("enum"):
        return " \\| ".join(f"`{choice}`" for choice in choices)
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema.get("pattern") in DURATIONS:
        return "duration"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_name(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if kind == "object" and isinstance(values, dict):
        return f"map of {type_name(values)}"
    return kind + _bounds(schema)


def _bounds(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f", {low} to {high}"
    if low is not None:
        return f", from {low}"
    return f", up to {high}" if high is not None else ""
