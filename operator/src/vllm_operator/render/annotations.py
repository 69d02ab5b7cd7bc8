"""What the operator remembers, in the Deployment's annotations: there is no state but the cluster.

`last-good`, `rolled-back` and `secrets` hold JSON. One that cannot be read counts as absent: somebody's edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_operator import names
from vllm_operator.render.facts import GoodTemplate, LiveDeployment, Manifest, RolledBack

# An object's annotations may have 256 KiB together.
MAX_TEMPLATE_CHARACTERS = 64 * 1024


def live_deployment(body: Mapping[str, Any] | None) -> LiveDeployment | None:
    if body is None:
        return None
    said = body["metadata"].get("annotations") or {}
    return LiveDeployment(
        template_hash=said.get(names.ANNOTATION_TEMPLATE_HASH, ""),
        strategy=body["spec"].get("strategy") or {},
        why=said.get(names.ANNOTATION_ROLLOUT, ""),
        template=body["spec"].get("template"),
        good=_good(_read(said, names.ANNOTATION_LAST_GOOD)),
        rolled_back=_rolled_back(_read(said, names.ANNOTATION_ROLLED_BACK)),
        upgrade=said.get(names.ANNOTATION_UPGRADE, ""),
        secrets=_secrets(_read(said, names.ANNOTATION_SECRETS)),
    )


def good_annotation(good: GoodTemplate) -> dict[str, str]:
    """Empty for a template that is too large: without it there is no way back, but the edit goes through."""
    text = _written({"generation": good.generation, "template": good.template})
    return {names.ANNOTATION_LAST_GOOD: text} if len(text) <= MAX_TEMPLATE_CHARACTERS else {}


def rolled_back_annotation(failed: RolledBack) -> dict[str, str]:
    found = {"generation": failed.generation, "template": failed.template_hash, "why": failed.why}
    return {names.ANNOTATION_ROLLED_BACK: _written(found)}


def secrets_annotation(seen: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    text = _written({name: list(pair) for name, pair in seen.items()})
    return {names.ANNOTATION_SECRETS: text} if seen else {}


def template_hash(template: Mapping[str, Any]) -> str:
    said = (template.get("metadata") or {}).get("annotations") or {}
    return str(said.get(names.ANNOTATION_TEMPLATE_HASH, ""))


def _good(found: dict[str, Any]) -> GoodTemplate | None:
    template, generation = found.get("template"), found.get("generation")
    if not isinstance(template, dict) or not isinstance(generation, int) or not template_hash(template):
        return None
    return GoodTemplate(generation, template_hash(template), template)


def _rolled_back(found: dict[str, Any]) -> RolledBack | None:
    template, generation = found.get("template"), found.get("generation")
    if not isinstance(template, str) or not isinstance(generation, int):
        return None
    return RolledBack(template, generation, str(found.get("why", "")))


def _secrets(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        name: (str(pair[0]), str(pair[1]))
        for name, pair in found.items()
        if isinstance(pair, list) and len(pair) == 2
    }


def _read(annotations: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(annotations.get(name) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _written(value: Manifest) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
