"""What a client of the fake API server gets to see: label and field selectors, metadata alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def partial_metadata(body: Json) -> Json:
    """A PartialObjectMetadata, or a list of them: the content is left out."""
    if "items" in body:
        items = [partial_metadata(item) for item in body["items"]] or None  # as the real one has it
        return {**body, "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "items": items}
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": body["metadata"]}


def selected(body: Json, labels: str, fields: str) -> bool:
    """Whether an object is in the selection: `k=v,k!=v,k in (a,b),k,!k`, and fields by path, `=` or `!=`."""
    have = body["metadata"].get("labels") or {}
    terms = re.findall(r"[^,(]+(?:\([^)]*\))?", labels)
    return all(_term_holds(term.strip(), have) for term in terms) and all(
        _field_holds(term, body) for term in fields.split(",") if term
    )


def _field_holds(term: str, body: Json) -> bool:
    path, unequal, wanted = re.fullmatch(r"([\w.]+)(!?)==?(.*)", term).groups()  # type: ignore[union-attr]
    value: Any = body
    for part in path.split("."):
        value = (value or {}).get(part)
    return ((value or "") == wanted) != bool(unequal)


def _term_holds(term: str, have: Mapping[str, str]) -> bool:
    if match := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", term):
        values = {value.strip() for value in match[3].split(",")}
        return (have.get(match[1]) in values) == (match[2] == "in")
    if match := re.fullmatch(r"([^=!]+?)\s*(!=|==|=)\s*(.*)", term):
        return (have.get(match[1]) == match[3]) == (match[2] != "!=")
    return term[1:] not in have if term.startswith("!") else term in have
