"""The claim of a cache, `<model>-cache`.

A claim's class and access modes never change and its size only grows, so an edit that asks for anything else
is refused here, with what to do instead of the API server's words.
https://kubernetes.io/docs/concepts/storage/persistent-volumes/#expanding-persistent-volumes-claims
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_operator import names
from vllm_operator.api.cache import Cache
from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.errors import Problem, SpecError
from vllm_operator.render.facts import Facts, LiveClaim, Manifest
from vllm_operator.render.requests import counted
from vllm_operator.render.workload import child

DEFAULT_MODES = ("ReadWriteOnce",)


def live_claim(body: Manifest | None) -> LiveClaim | None:
    """What `render` needs to know of a claim that the API server has."""
    if body is None:
        return None
    spec, status = body.get("spec") or {}, body.get("status") or {}
    asked = str(((spec.get("resources") or {}).get("requests") or {}).get("storage", "0"))
    has = str((status.get("capacity") or {}).get("storage", asked))  # may be more, and after a growth less
    return LiveClaim(
        created=body["metadata"].get("creationTimestamp", ""),
        storage_class=spec.get("storageClassName") or "",
        access_modes=tuple(spec.get("accessModes") or ()),
        least=min(asked, has, key=_bytes),
    )


def claim_manifest(model: VLLMModel, cache: Cache, facts: Facts) -> Manifest:
    """Raises SpecError where the live claim cannot become what is asked for."""
    name = names.cache_name(model.metadata.name)
    if facts.claim is not None and (problems := tuple(_conflicts(cache, facts.claim, name))):
        raise SpecError(problems)
    manifest = child("v1", "PersistentVolumeClaim", model, name)
    manifest["spec"] = {
        "accessModes": list(cache.access_modes or DEFAULT_MODES),
        **({"storageClassName": cache.storage_class_name} if cache.storage_class_name else {}),
        "resources": {"requests": {"storage": str(cache.size)}},
    }
    return manifest


def _conflicts(cache: Cache, live: LiveClaim, name: str) -> Iterator[Problem]:
    anew = f"or delete the claim {name} and then the model's pods, and the weights are downloaded again"
    if cache.storage_class_name not in (None, live.storage_class):
        yield Problem(
            "spec.cache.storageClassName",
            f"a claim's class never changes: set {live.storage_class or 'no class'}, {anew}",
        )
    if set(cache.access_modes or DEFAULT_MODES) != set(live.access_modes):
        modes = ", ".join(live.access_modes)
        yield Problem("spec.cache.accessModes", f"a claim's modes never change: set [{modes}], {anew}")
    if _bytes(cache.size) < _bytes(live.least):
        yield Problem("spec.cache.size", f"a claim never shrinks: set {live.least} or more, {anew}")


def _bytes(quantity: Any) -> int:
    return counted({"memory": quantity})["memory"]
