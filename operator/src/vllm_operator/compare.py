"""Whether a live object still is what was rendered, so that what is equal is never written.

A false difference costs one write that changes nothing; a false equality must not occur.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

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
