"""`spec.profile`: the platform's defaults under what a model says itself, before the whole is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_operator.api.placement import Profile
from vllm_operator.errors import Problem, SpecError

Profiles = Mapping[str, Profile]

# Joined key by key; a toleration or an affinity of the model's own stands for all of the profile's.
_JOINED = ("nodeSelector", "requests", "limits")


def with_profile(spec: Mapping[str, Any], profiles: Profiles) -> dict[str, Any]:
    """The spec with its profile's defaults. Raises SpecError for a name that the settings do not have."""
    name = spec.get("profile")
    if not isinstance(name, str):
        return dict(spec)
    if name not in profiles:
        known = ", ".join(sorted(profiles)) or "none"
        advice = f"is no profile of the operator's settings (known: {known}); offline, give them by --config"
        raise SpecError((Problem("spec.profile", advice),))
    defaults = profiles[name].model_dump(by_alias=True, mode="json", exclude_unset=True)
    return {**spec, **{field: _over(values, spec.get(field, {})) for field, values in defaults.items()}}


def _over(defaults: Mapping[str, Any], own: Any) -> Any:
    """A section of the wrong type is left as it is, to be refused."""
    if not isinstance(own, dict):
        return own
    both = [key for key in _JOINED if isinstance(defaults.get(key), dict) and isinstance(own.get(key), dict)]
    return {**defaults, **own, **{key: {**defaults[key], **own[key]} for key in both}}
