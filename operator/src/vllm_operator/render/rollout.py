"""How a Deployment replaces its pods. Always RollingUpdate: a change of `type` would be refused (422)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Facts, Manifest
from vllm_operator.render.scheduling import shortage

_STEPS: dict[str, tuple[int | str, int | str]] = {  # maxSurge, maxUnavailable
    "Surge": (1, 0),
    "InPlace": (0, 1),
    "Recreate": (0, "100%"),
}


@dataclass(frozen=True)
class Choice:
    """How the pods of one template are brought out, and why Auto did not surge."""

    strategy: Manifest
    why: str = ""


def rollout_choice(spec: Spec, pod: Manifest, facts: Facts, template_hash: str) -> Choice:
    """Decided once for a pod template: while it is the live one, what was decided stays.

    Otherwise free GPUs that come and go would switch a rollout in its middle.
    """
    live, asked = facts.live, spec.rollout.strategy
    if asked == "Auto" and live is not None and live.template_hash == template_hash and live.strategy:
        return Choice(dict(live.strategy), live.why)
    why = in_place_because(spec, pod, facts) if asked == "Auto" else ""
    surge, unavailable = _STEPS[asked if asked != "Auto" else "InPlace" if why else "Surge"]
    rolling = {"maxSurge": surge, "maxUnavailable": unavailable}
    return Choice({"type": "RollingUpdate", "rollingUpdate": rolling}, why)


def in_place_because(spec: Spec, pod: Manifest, facts: Facts) -> str:
    """Empty where Auto surges: a spare pod finds its place. On a full pool it would wait for ever.

    Unknown counts as full for those who ask for GPUs, which are scarce, and as free for others.
    """
    if not spec.mounts_anywhere:
        return "the cache's claim is mounted by one node at a time (ReadWriteOnce)"
    if spec.nodes > 1:
        return f"{spec.nodes} nodes at once are taken, and whether so many have room is not counted"
    if spec.resource_claims:
        return "whether a claimed device is free, only the scheduler knows"
    if facts.nodes is None:
        return "free GPUs are not counted" if spec.gpu_count else ""
    return shortage(pod, facts.nodes)
