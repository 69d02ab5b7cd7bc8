"""Which fields of an object are ours, as the API server books them (metadata.managedFields).

What a POST sets is booked for its manager as an Update; a later server-side apply of the same manager is
booked apart, and removes only what an apply had set. So before an object that we created is applied for the
first time, its Update is made an Apply: else what is taken out of a model would stay in its children.
https://kubernetes.io/docs/reference/using-api/server-side-apply/ ("upgrading from client-side apply")
"""

from __future__ import annotations

from typing import Any

from vllm_operator.kinds import Body
from vllm_operator.names import FIELD_MANAGER


def slimmed(body: Body) -> Body:
    """Without managedFields, which are most of an object, but for the mark of an Update of ours."""
    meta = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    if any(map(_is_our_update, body["metadata"].get("managedFields") or ())):
        meta["managedFields"] = [{"manager": FIELD_MANAGER, "operation": "Update"}]
    return {**body, "metadata": meta}


def is_booked_as_update(body: Body) -> bool:
    return any(map(_is_our_update, body["metadata"].get("managedFields") or ()))


def booked_as_apply(entries: list[Body]) -> list[Body]:
    """The entries of a whole object, in which what was our Update is in our Apply."""
    ours = [item for item in entries if _is_our_update(item) or _is_our_apply(item)]
    fields: dict[str, Any] = {}
    for item in ours:
        fields = _joined(fields, item.get("fieldsV1") or {})
    joined = {**ours[-1], "operation": "Apply", "fieldsV1": fields}
    return [*(item for item in entries if item not in ours), joined]


def _is_our_update(item: Body) -> bool:
    return _is_ours(item) and item.get("operation") == "Update"


def _is_our_apply(item: Body) -> bool:
    return _is_ours(item) and item.get("operation") == "Apply"


def _is_ours(item: Body) -> bool:
    return item.get("manager") == FIELD_MANAGER and not item.get("subresource")


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both sets of fields. A set is a tree of maps, and its leaves are empty."""
    both = {key: _joined(value, other[key]) for key, value in one.items() if key in other}
    return {**one, **other, **both}
