"""The CustomResourceDefinition, made from the Pydantic models.

The converter is strict: whatever it does not know, and whatever an API server would refuse or could not bound
the cost of (a string, list or map without a maximum), is a SchemaError at once and not a 422 later.
Structural schemas: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from vllm_operator import names
from vllm_operator.api.status import Status
from vllm_operator.api.v1alpha1 import COLUMNS, SCALE, Column, Spec, VLLMModel
from vllm_operator.api.values import Rule, Section
from vllm_operator.errors import SchemaError

Json = dict[str, Any]

# Pydantic's keyword -> the structural schema's, per type. `title` and `default` are dropped on purpose.
_COMMON = {"type", "description", "enum", "nullable"}
_KEYWORDS = {
    "string": _COMMON | {"minLength", "maxLength", "pattern", "format"},
    "integer": _COMMON | {"minimum", "maximum"},
    "number": _COMMON | {"minimum", "maximum"},
    "boolean": _COMMON,
    "array": _COMMON
    | {"items", "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"},
    "object": _COMMON
    | {"properties", "required", "additionalProperties", "maxProperties", "minProperties"}
    | {
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-validations",
        "propertyNames",
        "patternProperties",
    },
}
_DROPPED = {"title", "default"}

# The one default of the schema, for a model that no operator has looked at yet: kstatus (`helm --wait`,
# Argo CD, Flux) takes an object that says nothing of itself to be finished.
# https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md
UNSEEN = {"observedGeneration": -1}


def crd_manifest() -> Json:
    """The whole CRD, ready for `kubectl apply`."""
    schema = {
        "type": "object",
        "description": VLLMModel.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural_schema(Spec),
            "status": structural_schema(Status) | {"default": UNSEEN},
        },
        "x-kubernetes-validations": [_validation(rule) for rule in VLLMModel.rules],
    }
    version = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}, "scale": dict(SCALE)},
        "additionalPrinterColumns": [_column(column) for column in COLUMNS],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": ["vllm"],
                "categories": ["all"],
            },
            "versions": [version],
        },
    }


def structural_schema(model: type[BaseModel]) -> Json:
    """Raises SchemaError for any construct outside the structural subset."""
    document = model.model_json_schema(by_alias=True)
    schema = _Converter(document.get("$defs", {})).convert(document, model.__name__)
    _add_rules(schema, model)
    return schema


def _column(column: Column) -> Json:
    made = {"name": column.name, "type": column.type, "jsonPath": column.path}
    return made | ({"priority": column.priority} if column.priority else {})


class _Converter:
    def __init__(self, definitions: Mapping[str, Json]) -> None:
        self.definitions = definitions

    def convert(self, node: Json, path: str) -> Json:
        given = self._resolve(node, path)
        if given.get("x-kubernetes-int-or-string"):
            return _int_or_string(given, path)
        node = {key: value for key, value in given.items() if key not in _DROPPED | {"$defs"}}
        node |= _default_in_words(given)
        if "const" in node:
            node["enum"] = [node.pop("const")]
        kind = node.get("type")
        if kind not in _KEYWORDS:
            raise SchemaError(f"{path}: type {kind!r} has no structural schema")
        if unknown := node.keys() - _KEYWORDS[kind]:
            raise SchemaError(f"{path}: {', '.join(sorted(unknown))} has no place in a structural {kind}")
        self._check_bounds(node, path)
        return self._descend(node, path)

    def _resolve(self, node: Json, path: str) -> Json:
        """`$ref` put in place and `X | None` reduced to X; siblings win, since they are the field's own."""
        node = copy.deepcopy(node)  # a shared node would become an alias in YAML
        while "$ref" in node or "anyOf" in node:
            inner = self._referred(node, path) if "$ref" in node else self._optional(node.pop("anyOf"), path)
            node = {**inner, **{key: value for key, value in node.items() if key != "$ref"}}
        return node

    def _referred(self, node: Json, path: str) -> Json:
        name = str(node["$ref"]).removeprefix("#/$defs/")
        if name not in self.definitions:
            raise SchemaError(f"{path}: unknown reference {node['$ref']}")
        return self.definitions[name]

    def _optional(self, branches: list[Json], path: str) -> Json:
        """A null is refused by the API server for fields that are not nullable, and none of ours is."""
        some = [branch for branch in branches if branch.get("type") != "null"]
        if len(some) != 1:
            raise SchemaError(f"{path}: a union of {len(some)} types has no structural schema")
        return some[0]

    def _check_bounds(self, node: Json, path: str) -> None:
        kind = node["type"]
        bounded = "enum" in node or node.get("format") == "date-time"
        if kind == "string" and not bounded and "maxLength" not in node:
            raise SchemaError(f"{path}: a string needs max_length")
        if kind == "array" and "maxItems" not in node:
            raise SchemaError(f"{path}: a list needs max_length")
        is_map = (
            kind == "object" and "properties" not in node and node.get("additionalProperties") is not False
        )
        if is_map and "maxProperties" not in node:
            raise SchemaError(f"{path}: a map needs max_length")
        if kind == "object" and node.get("additionalProperties") is True:
            raise SchemaError(f"{path}: a map of anything needs x-kubernetes-preserve-unknown-fields")

    def _descend(self, node: Json, path: str) -> Json:
        if node["type"] == "array":
            node["items"] = self.convert(node["items"], f"{path}[]")
        if node["type"] != "object":
            return node
        node.pop("propertyNames", None)  # the form of keys has no structural counterpart; parse() checks it
        patterns = node.pop("patternProperties", {"": None})
        values = node.pop("additionalProperties", None) or next(iter(patterns.values()))
        if "properties" in node:  # additionalProperties: false goes; a structural schema prunes by itself
            found = node["properties"].items()
            node["properties"] = {name: self.convert(item, f"{path}.{name}") for name, item in found}
        elif isinstance(values, dict):
            node["additionalProperties"] = self.convert(values, f"{path}{{}}")
        return node


def _default_in_words(node: Json) -> Json:
    """A default of ours is no default of the schema: the description says it, for `kubectl explain`."""
    default, text = node.get("default"), node.get("description", "")
    told = isinstance(default, bool) or (bool(default) and not isinstance(default, dict | list))
    if not told or not text or "Default" in text:
        return {}
    return {"description": f"{text} Default: {json.dumps(default).strip(chr(34))}."}


def _int_or_string(node: Json, path: str) -> Json:
    known = {"x-kubernetes-int-or-string", "pattern", "maxLength", "description"}
    if unknown := node.keys() - known - _DROPPED:
        raise SchemaError(f"{path}: {', '.join(sorted(unknown))} has no place in an int-or-string")
    if "maxLength" not in node:
        raise SchemaError(f"{path}: a string needs max_length")
    kept = {key: value for key, value in node.items() if key in known}
    return {"anyOf": [{"type": "integer"}, {"type": "string"}], **kept}


def _add_rules(schema: Json, model: type[BaseModel]) -> None:
    """Puts every Section's rules on the object that it became."""
    for field in model.model_fields.values():
        inner = section_of(field.annotation)
        if inner is not None:
            node = schema["properties"][str(field.alias)]
            while "properties" not in node and (
                inside := node.get("items", node.get("additionalProperties"))
            ):
                node = inside  # lists and maps of sections, however deep
            _add_rules(node, inner)
    if issubclass(model, Section) and model.rules:
        schema["x-kubernetes-validations"] = [_validation(rule) for rule in model.rules]


def _validation(rule: Rule) -> Json:
    made = {"rule": rule.cel, "message": rule.message}
    return made | ({"fieldPath": rule.field} if rule.field else {})


def section_of(annotation: Any) -> type[Section] | None:
    """The Section inside `X`, `X | None`, `tuple[X, ...]` or `Annotated[X, …]`, where there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := section_of(part))), None)
