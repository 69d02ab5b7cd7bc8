"""Secrets that a pod's variables come from: a container never sees their change, so its pods are replaced.

Only names and resourceVersions are known here (`settings.secretAccess`), never a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_operator import names
from vllm_operator.render.facts import Facts, Manifest


def referenced(pod: Mapping[str, Any]) -> tuple[str, ...]:
    """The Secrets of others that a pod's spec takes variables from, by name. The engine's key is our own: it
    never changes under its name.
    """
    return tuple(sorted(set(_in_variables(pod))))


def _in_variables(pod: Mapping[str, Any]) -> Iterator[str]:
    for container in (*_objects(pod, "containers"), *_objects(pod, "initContainers")):
        variables = [item for item in _objects(container, "env") if item.get("name") != "VLLM_API_KEY"]
        sources = [item.get("valueFrom") for item in variables]
        found = [source.get("secretKeyRef") for source in sources if isinstance(source, dict)]
        found += [item.get("secretRef") for item in _objects(container, "envFrom")]
        yield from (str(item["name"]) for item in found if isinstance(item, dict) and item.get("name"))


def engine_key_of(template: Mapping[str, Any]) -> str:
    """Name of the Secret with the key that the engine of a pod template asks for; empty for none."""
    for container in _objects(template.get("spec") or {}, "containers"):
        for item in _objects(container, "env"):
            if item.get("name") == "VLLM_API_KEY":
                reference = (item.get("valueFrom") or {}).get("secretKeyRef") or {}
                return str(reference.get("name", ""))
    return ""


def _objects(holder: Mapping[str, Any], field: str) -> Iterator[dict[str, Any]]:
    """A podTemplate may have put anything there; what is no list of objects the API server will refuse."""
    items = holder.get(field)
    yield from (item for item in (items if isinstance(items, list) else ()) if isinstance(item, dict))


def versions_seen(pod: Mapping[str, Any], facts: Facts) -> dict[str, tuple[str, str]]:
    """By Secret: its version when the Deployment first referred to it, and the newest; "" for none.

    A Secret that is gone keeps its last: its pods run on. Where Secrets are not to be seen (any more), what
    was known stays, so that neither turning `secretAccess` on nor off restarts anything.
    """
    known = facts.live.secrets if facts.live is not None else {}
    wanted = referenced(pod)
    if facts.secrets is None:
        return {name: known[name] for name in wanted if name in known}
    seen = {}
    for name in wanted:
        now = facts.secrets.get(name, "")
        first, last = known.get(name, (now, now))
        seen[name] = (first, now or last)
    return seen


def with_secret_versions(template: Manifest, seen: Mapping[str, tuple[str, str]]) -> Manifest:
    """The template with an annotation for the Secrets that have changed since they were first seen."""
    changed = {name: last for name, (first, last) in seen.items() if last != first}
    if not changed:
        return template
    meta = template["metadata"]
    marks = {
        **meta.get("annotations", {}),
        names.ANNOTATION_SECRET_VERSIONS: json.dumps(changed, sort_keys=True, separators=(",", ":")),
    }
    return {**template, "metadata": {**meta, "annotations": marks}}
