"""Base class, rules and scalar types that the API's models are made of.

A `Rule` is said twice, as CEL for the API server and as a predicate for `parse`, side by side; one table of
invalid objects (tests/operator/invalid_models.yaml) runs through both, so that they cannot drift apart.
There are no schema defaults: a stored object keeps what a person wrote, and a default can be bettered later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A constraint across fields of one section.

    `cel` and `holds` judge the same section: `self` in CEL is the argument of `holds`. `field` is where the
    API server reports the failure, relative to the section (`.count`); it must exist in the schema.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    field: str = ""


class Section(BaseModel):
    """A part of the API: immutable, strict about types, closed to unknown fields, camelCase outside."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", alias_generator=to_camel, populate_by_name=True
    )
    rules: ClassVar[tuple[Rule, ...]] = ()


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
DURATION_PATTERN = "^([0-9]+(h|m|s|ms))+$"


def seconds(duration: str) -> float:
    """`1h30m` is 5400.0. The grammar is a subset of Go's, which CEL's duration() reads too."""
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)(ms|h|m|s)", duration))


Duration = Annotated[str, Field(pattern=DURATION_PATTERN, max_length=16)]


def duration_rule(field: str, lowest: str, highest: str) -> Rule:
    """Bounds of an optional duration; `field` is its name in camelCase."""
    attribute = re.sub("[A-Z]", lambda match: f"_{match[0].lower()}", field)

    def holds(section: Section) -> bool:
        value = getattr(section, attribute)
        return value is None or seconds(lowest) <= seconds(value) <= seconds(highest)

    within = (
        f"duration(self.{field}) >= duration('{lowest}') && duration(self.{field}) <= duration('{highest}')"
    )
    message = f"must be between {lowest} and {highest}"
    return Rule(f"!has(self.{field}) || ({within})", message, holds, f".{field}")


QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"


def _quantity(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and len(value) <= 32 and re.fullmatch(QUANTITY_PATTERN, value):
        return value
    raise ValueError("must be a Kubernetes quantity such as 4, 500m or 32Gi")


Quantity = Annotated[
    int | str,
    PlainValidator(_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": 32}),
]


def text(max_length: int = 253, pattern: str | None = None) -> Any:
    """The limits of one string; to be used in `Annotated`."""
    return Field(min_length=1, max_length=max_length, pattern=pattern)


DNS_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
ObjectName = Annotated[str, text(253, rf"^{DNS_LABEL}(\.{DNS_LABEL})*$")]
# prefix/name of a label, an annotation or an extended resource
QualifiedName = Annotated[
    str, text(317, r"^([A-Za-z0-9][-A-Za-z0-9_.]*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
Image = Annotated[str, text(512, r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
# A folder of a node, written without detours.
HostPath = Annotated[str, text(512, r"^/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")]
ProfileName = Annotated[str, text(63, rf"^{DNS_LABEL}$")]
# Short names of models and adapters, as callers write them.
ServedName = Annotated[str, text(128, r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]
Word = Annotated[str, text(63, r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

# An object of the Kubernetes API that is handed on unread; the API server judges it where it is applied.
FreeForm = Annotated[
    Mapping[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True, "maxProperties": 64}),
]
