"""Strategic merge of a pod template, as `kubectl patch` does it.

https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The merge keys of a pod's lists (`patchMergeKey` in the API's types); every other list is replaced whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
DIRECTIVE = "$patch"
# Two sources in one volume would be refused: the patch's takes the place of ours.
_ONE_OF = {"volumes"}


def merged(base: Any, patch: Any, field: str = "") -> Any:
    """`base` with `patch` over it; neither is changed. New items of a list come after those of `base`."""
    if isinstance(base, dict) and isinstance(patch, Mapping):
        return _merged_map(base, patch)
    if isinstance(base, list) and isinstance(patch, list) and field in MERGE_KEYS:
        return _merged_list(base, patch, field)
    return _without_directives(patch)


def _merged_map(base: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    if patch.get(DIRECTIVE) == "replace":
        return dict(_without_directives(patch))
    made = dict(base)
    for key, value in patch.items():
        if isinstance(value, Mapping) and value.get(DIRECTIVE) == "delete":
            made.pop(key, None)
        elif key != DIRECTIVE:
            made[key] = merged(base.get(key), value, key)
    return made


def _merged_list(base: list[Any], patch: list[Any], field: str) -> list[Any]:
    key = MERGE_KEYS[field]
    found = {item[key]: item for item in base}
    for item in patch:
        name = item.get(key) if isinstance(item, Mapping) else None
        if not isinstance(name, str | int):
            return list(_without_directives(patch))  # no such list in a pod; the API server will say so
        if item.get(DIRECTIVE) == "delete":
            found.pop(name, None)
        else:
            found[name] = merged(_kept(found.get(name), item, field), item)
    return list(found.values())


def _kept(base: dict[str, Any] | None, item: Mapping[str, Any], field: str) -> dict[str, Any] | None:
    if base is None or field not in _ONE_OF:
        return base
    return {key: value for key, value in base.items() if key in item}


def _without_directives(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_directives(item) for key, item in value.items() if key != DIRECTIVE}
    if isinstance(value, list | tuple):
        kept = (item for item in value if not _deleted(item))
        return [_without_directives(item) for item in kept]
    return value


def _deleted(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get(DIRECTIVE) == "delete"
