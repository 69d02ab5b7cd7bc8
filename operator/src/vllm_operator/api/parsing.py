"""`parse(body)`: a VLLMModel, or one SpecError that names every bad field and how to mend it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vllm_operator import names
from vllm_operator.api.flags import extra_args_problems
from vllm_operator.api.profiles import Profiles, with_profile
from vllm_operator.api.status import Status
from vllm_operator.api.v1alpha1 import Metadata, VLLMModel
from vllm_operator.api.values import DURATION_PATTERN, Section
from vllm_operator.errors import Problem, SpecError, clip

_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
}
_FORMS = {DURATION_PATTERN: "must be a duration such as 90s, 30m or 1h30m"}
_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean (true or false)",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def identify(body: Mapping[str, Any]) -> Metadata:
    """The object's metadata, which the API server vouches for even where the spec is wrong."""
    return Metadata.model_validate_json(json.dumps(body["metadata"]))


def previous_status(body: Mapping[str, Any]) -> Status:
    """The status last written; one that cannot be read (an older operator's) counts as none."""
    try:
        return Status.model_validate_json(json.dumps(body.get("status") or {}))
    except ValidationError:
        return Status()


NO_PROFILES: Profiles = {}


def parse(body: Mapping[str, Any], profiles: Profiles = NO_PROFILES) -> VLLMModel:
    """Raises SpecError. What it refuses and the API server does not is listed in the reference.

    `profiles` are the platform's; the model that comes back has their defaults in its spec.
    """
    if problems := tuple(_envelope(body)) or tuple(_nulls(body["spec"], "spec")):
        raise SpecError(problems)
    document = json.dumps({"metadata": body["metadata"], "spec": with_profile(body["spec"], profiles)})
    try:
        model = VLLMModel.model_validate_json(document)
    except ValidationError as error:
        raise SpecError(tuple(_problem(detail) for detail in error.errors())) from error
    if problems := (*_broken_rules(model, ""), *extra_args_problems(model.spec)):
        raise SpecError(problems)
    return model.model_copy(update={"status": previous_status(body)})


def _envelope(body: Mapping[str, Any]) -> Iterator[Problem]:
    for field, wanted in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if body.get(field) != wanted:
            yield Problem(field, f"must be {wanted}")
    for field in ("metadata", "spec"):
        if not isinstance(body.get(field), dict):
            yield Problem(field, "is required and must be an object")


def _nulls(value: Any, path: str) -> Iterator[Problem]:
    if value is None:
        yield Problem(path, "must not be null; leave the field out")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, f"{path}[{index}]")


def _broken_rules(section: Section, path: str) -> Iterator[Problem]:
    """Depth first, so that a field's own rules come before those of the whole."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        where = f"{path}.{field.alias}".lstrip(".")
        for index, item in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(item, Section):
                yield from _broken_rules(item, f"{where}[{index}]")
        if isinstance(value, Section):
            yield from _broken_rules(value, where)
    for rule in type(section).rules:
        if not rule.holds(section):
            yield Problem(f"{path}{rule.field}".lstrip(".") or "metadata.name", rule.message)


def _problem(detail: ErrorDetails) -> Problem:
    path = ""
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return Problem(path.lstrip("."), _advice(detail))


def _advice(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    messages = {
        "missing": "is required",
        "extra_forbidden": f"is no field{_did_you_mean(detail['loc'])}" if kind == "extra_forbidden" else "",
        "literal_error": f"must be one of {context.get('expected')}",
        "string_pattern_mismatch": _FORMS.get(
            context.get("pattern", ""), f"must match {context.get('pattern')}"
        ),
        "value_error": clip(str(context.get("error"))),
    }
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {_JSON_TYPES.get(type(detail['input']), 'this')}"
    return messages.get(kind) or clip(re.sub("^(Input|String|Tuple|Mapping) should", "must", detail["msg"]))


def _did_you_mean(loc: tuple[int | str, ...]) -> str:
    section: Any = VLLMModel
    for part in loc[:-1]:
        fields = {field.alias: field.annotation for field in section.model_fields.values()}
        section = _section_in(fields.get(str(part))) if not isinstance(part, int) else section
        if section is None:
            return ""
    known = [str(field.alias) for field in section.model_fields.values()]
    near = difflib.get_close_matches(str(loc[-1]), known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section inside `X | None` or `tuple[X, ...]`, where there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _section_in(part))), None)
