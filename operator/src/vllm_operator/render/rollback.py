"""Which pod template a Deployment gets: the wanted one, or the last that served where the wanted one failed.

The template to return to is written in the very apply that replaces it, so no moment is without one, and an
operator that starts anew finds it. A template that failed is remembered by its hash, so it is not tried again
until an edit, or a Secret that changed, makes it another.
"""

from __future__ import annotations

from typing import Any

from vllm_operator import names
from vllm_operator.api.status import Served
from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.annotations import good_annotation, rolled_back_annotation
from vllm_operator.render.facts import Facts, GoodTemplate, LiveDeployment, Manifest, RolledBack
from vllm_operator.render.secrets import engine_key_of


def way_back(
    facts: Facts, spec: Spec, template_hash: str, key_secret: str = ""
) -> tuple[RolledBack, GoodTemplate] | None:
    """Why the wanted template is not to run, and what runs instead; None where it is to run."""
    live = facts.live
    failed = facts.failed or (live.rolled_back if live is not None else None)
    if spec.rollout.rollback == "Never" or live is None or live.good is None or failed is None:
        return None
    if failed.template_hash != template_hash or live.good.template_hash == template_hash:
        return None
    return (failed, live.good) if has_key(live.good.template, key_secret) else None


def has_key(template: Manifest, key_secret: str) -> bool:
    """Whether engines of this pod template ask for the key that callers have now, or for none. With another
    one they would run, and serve nobody.
    """
    return engine_key_of(template) in ("", key_secret)


def remembered(facts: Facts, spec: Spec, template_hash: str, served: Served) -> dict[str, str]:
    """The annotations of a Deployment that runs the wanted template, where there is something to remember."""
    live = facts.live
    if live is None or spec.rollout.rollback == "Never":
        return {}
    good = live.good
    if live.template_hash != template_hash and _has_served(live, served) and live.template is not None:
        good = GoodTemplate(served.generation, live.template_hash, without_nulls(live.template))
    return good_annotation(good) if good is not None else {}


def turned_back(back: tuple[RolledBack, GoodTemplate]) -> dict[str, str]:
    return rolled_back_annotation(back[0]) | good_annotation(back[1])


def upgrade_mark(facts: Facts, template_hash: str) -> dict[str, str]:
    """Told from an edit's rollout by this mark, which stays until the next edit."""
    live = facts.live
    if live is None or (live.upgrade != template_hash and not _is_upgrade(facts, live, template_hash)):
        return {}
    return {names.ANNOTATION_UPGRADE: template_hash}


def _is_upgrade(facts: Facts, live: LiveDeployment, template_hash: str) -> bool:
    taken_back = live.rolled_back is not None and live.rolled_back.template_hash == template_hash
    return facts.unedited and live.template_hash not in ("", template_hash) and not taken_back


def _has_served(live: LiveDeployment, served: Served) -> bool:
    return bool(live.template_hash) and live.template_hash == served.template


def without_nulls(value: Any) -> Any:
    """What the API server answers, as it can be applied again."""
    if isinstance(value, dict):
        kept: Manifest = {key: without_nulls(item) for key, item in value.items() if item is not None}
        return kept
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
