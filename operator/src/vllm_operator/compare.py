"""Whether a live object still is what was rendered, so that what is equal is never written.

A false difference costs one write that changes nothing; a false equality must not occur.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from vllm_operator.errors import clip
from vllm_operator.observe.engine_log import scrub

_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001")}
_SUFFIXES |= {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)}
_SUFFIXES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}
_QUANTITIES = {"limits", "requests"}
_QUANTITY = "sizeLimit"

# List items that are told apart by a key; in every other list, position and number count.
_KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}
_KEYS |= {
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "ownerReferences": "uid",
    "conditions": "type",
}


MAX_TOLD = 5  # fields
_MAX_VALUE = 80
_SECRET_PARENTS = {"env"}  # a variable's value may be a credential, whoever wrote it


def differs(wanted: dict[str, Any], live: dict[str, Any]) -> bool:
    """True unless `live` has every field of `wanted`, the hash of the whole among them.

    The hash tells of a field that is no longer wanted, and so stands in the live object alone.
    """
    return not contains(live, wanted)


def contains(live: Any, wanted: Any, field: str = "") -> bool:
    """Whether every field of `wanted` stands in `live` with the same value; what others added is left alone.

    An empty object or list that the server leaves out counts as there.
    """
    if isinstance(wanted, dict):
        live = live if live is not None else {}
        return isinstance(live, dict) and all(_has(live, key, value, field) for key, value in wanted.items())
    if isinstance(wanted, list):
        return _contains_list(live or [], wanted, field)
    return bool(live == wanted) or (
        (field in _QUANTITIES or field == _QUANTITY) and same_quantity(live, wanted)
    )


def _has(live: dict[str, Any], key: str, wanted: Any, field: str) -> bool:
    """A quantity's own name is no field name: what counts is that it stands in limits or requests."""
    return contains(live.get(key), wanted, field if field in _QUANTITIES else key)


def _contains_list(live: Any, wanted: list[Any], field: str) -> bool:
    if not isinstance(live, list):
        return False
    if (name := _KEYS.get(field)) is None:
        return len(live) == len(wanted) and all(map(contains, live, wanted))
    found = {item.get(name): item for item in live if isinstance(item, dict)}
    return all(contains(found.get(item[name]), item) and item[name] in found for item in wanted)


def same_quantity(one: Any, other: Any) -> bool:
    """`1000m` is `1`, `0.5Gi` is `512Mi`; what cannot be read is different."""
    first, second = _amount(one), _amount(other)
    return first is not None and first == second


def _amount(quantity: Any) -> Decimal | None:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(m|[kMGTPE]|[KMGTPE]i)?", str(quantity))
    return Decimal(found[1]) * _SUFFIXES[found[2] or ""] if found else None


def difference_text(wanted: dict[str, Any], live: dict[str, Any]) -> str:
    """`spec.replicas: 7 → 1; …`: what stands in the live object, and what is wanted instead.

    For people: at most MAX_TOLD fields, each clipped, and no value of an environment variable.
    """
    found = list(_differences(live, wanted, "", ""))
    told = [f"{path}: {_shown(path, old)} → {_shown(path, new)}" for path, old, new in found[:MAX_TOLD]]
    more = len(found) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _differences(live: Any, wanted: Any, path: str, field: str) -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, with the path to each."""
    if contains(live, wanted, field):
        return
    if isinstance(wanted, dict) and isinstance(live, dict):
        for key, value in wanted.items():
            inner = field if field in _QUANTITIES else key
            yield from _differences(live.get(key), value, f"{path}.{key}".lstrip("."), inner)
    elif isinstance(wanted, list) and isinstance(live, list) and field in _KEYS:
        named = {item.get(_KEYS[field]): item for item in live if isinstance(item, dict)}
        for item in wanted:
            key = item[_KEYS[field]]
            yield from _differences(named.get(key), item, f"{path}[{key}]", field)
    else:
        yield path, live, wanted


def _shown(path: str, value: Any) -> str:
    if value is None:
        return "nothing"
    if any(re.search(rf"(^|\.){parent}(\[|$)", path) for parent in _SECRET_PARENTS):
        return "(hidden)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return clip(scrub(text), _MAX_VALUE)
