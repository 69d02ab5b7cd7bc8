"""`render(model, settings, facts)`: every object that a model needs. Pure: the same in, the same out."""

from __future__ import annotations

from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.render.claim import claim_manifest
from vllm_operator.render.facts import NOTHING_KNOWN, Facts, Manifest
from vllm_operator.render.groups import group_manifest, pod_template_of
from vllm_operator.render.prefetch import held_back, prefetch_manifests
from vllm_operator.render.workload import (
    budget_manifest,
    deployment_manifest,
    engine_key_manifest,
    network_policy_manifest,
    service_manifest,
    stamped,
)
from vllm_operator.settings import Settings

__all__ = ["engine_key_manifest", "held_back", "pod_template_of", "render"]


def render(model: VLLMModel, settings: Settings, facts: Facts = NOTHING_KNOWN) -> tuple[Manifest, ...]:
    """In the order of creation: the Service first, so that the first endpoint finds it. Which of them wait
    for others, `held_back` says.

    Raises SpecError for what only the settings can judge: see settings.policy.
    """
    cache, several = model.spec.cache, model.spec.nodes > 1
    workload = (group_manifest if several else deployment_manifest)(model, settings, facts)
    made = [service_manifest(model)]
    if cache is not None and cache.size is not None:
        made.append(claim_manifest(model, cache, facts))
    if model.spec.prefetches:
        made += prefetch_manifests(model, pod_template_of(workload), facts)
    made.append(workload)
    if model.spec.wanted_replicas > 1:
        made.append(budget_manifest(model))
    if peers := settings.network_policy.allow_from:
        made.append(network_policy_manifest(model, peers))
    return tuple(map(stamped, made))
