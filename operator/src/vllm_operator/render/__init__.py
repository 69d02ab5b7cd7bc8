"""`render(model, settings, facts)`: every object that a model needs. Pure: the same in, the same out."""

from __future__ import annotations

from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.render.facts import NOTHING_KNOWN, Facts, Manifest
from vllm_operator.render.workload import (
    budget_manifest,
    deployment_manifest,
    engine_key_manifest,
    network_policy_manifest,
    service_manifest,
    stamped,
)
from vllm_operator.settings import Settings

__all__ = ["engine_key_manifest", "render"]


def render(model: VLLMModel, settings: Settings, facts: Facts = NOTHING_KNOWN) -> tuple[Manifest, ...]:
    """In the order of creation: the Service first, so that the first endpoint finds it.

    Raises SpecError for what only the settings can judge: see settings.policy.
    """
    made = [service_manifest(model), deployment_manifest(model, settings, facts)]
    if model.spec.wanted_replicas > 1:
        made.append(budget_manifest(model))
    if peers := settings.network_policy.allow_from:
        made.append(network_policy_manifest(model, peers))
    return tuple(map(stamped, made))
