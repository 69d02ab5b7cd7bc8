"""How a Deployment replaces its pods. Always RollingUpdate: a change of `type` would be refused (422)."""

from __future__ import annotations

from vllm_operator.api.v1alpha1 import Spec
from vllm_operator.render.facts import Facts, Manifest
from vllm_operator.render.scheduling import spare_gpu_fits
from vllm_operator.settings import Settings

_STEPS: dict[str, tuple[int | str, int | str]] = {  # maxSurge, maxUnavailable
    "Surge": (1, 0),
    "InPlace": (0, 1),
    "Recreate": (0, "100%"),
}


def deployment_strategy(spec: Spec, settings: Settings, facts: Facts, template_hash: str) -> Manifest:
    """Decided once for a pod template: while it is the live one, what was decided stays.

    Otherwise free GPUs that come and go would switch a rollout in its middle.
    """
    live, asked = facts.live, spec.rollout.strategy
    if asked == "Auto" and live is not None and live.template_hash == template_hash and live.strategy:
        return dict(live.strategy)
    surge, unavailable = _STEPS[auto_strategy(spec, settings, facts) if asked == "Auto" else asked]
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}


def auto_strategy(spec: Spec, settings: Settings, facts: Facts) -> str:
    """Surge if a spare pod finds its GPUs; on a full pool it would wait for ever. Unknown counts as full."""
    if spec.resource_claims:
        return "InPlace"  # whether a device is free, only the scheduler knows
    if spec.gpu_count == 0:
        return "Surge"
    return "Surge" if facts.nodes is not None and spare_gpu_fits(spec, settings, facts.nodes) else "InPlace"
