"""The children of a model, and what each has: owner, labels, a hash of what was rendered."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable

from vllm_operator import names
from vllm_operator.api.v1alpha1 import Spec, VLLMModel
from vllm_operator.errors import SpecError
from vllm_operator.render.annotations import secrets_annotation
from vllm_operator.render.facts import Facts, Manifest
from vllm_operator.render.merge import merged
from vllm_operator.render.pod import pod_template, termination_grace_seconds
from vllm_operator.render.policy import Review, policy_problems
from vllm_operator.render.rollback import remembered, turned_back, upgrade_mark, way_back, without_nulls
from vllm_operator.render.rollout import rollout_choice
from vllm_operator.render.secrets import engine_key_of, versions_seen, with_secret_versions
from vllm_operator.settings import Peer, Settings

PROGRESS_SLACK_SECONDS = 60
_NOT_OF_PODS = {"replicas", "autoscaling", "gateway"}


def digest(manifest: Manifest) -> str:
    """16 hexadecimal digits that change with any field."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def engine_image(model: VLLMModel, settings: Settings, facts: Facts) -> str:
    """A default is kept once it is in use: a newer operator must not restart models by itself."""
    device, pin = model.spec.device, facts.pin
    if model.spec.image is not None:
        return model.spec.image
    if pin is not None and pin.device == device:
        return pin.image
    return settings.images.cuda if device == "cuda" else settings.images.cpu


def deployment_manifest(model: VLLMModel, settings: Settings, facts: Facts) -> Manifest:
    spec = model.spec
    wanted, wanted_hash = checked_template(model, settings, facts)
    seen = versions_seen(wanted["spec"], facts)
    back = way_back(facts, spec, wanted_hash, engine_key_of(wanted))
    template, template_hash = (back[1].template, back[1].template_hash) if back else (wanted, wanted_hash)
    manifest = child("apps/v1", "Deployment", model)
    choice = rollout_choice(spec, template["spec"], facts, template_hash)
    manifest["metadata"]["annotations"] = {
        names.ANNOTATION_TEMPLATE_HASH: template_hash,
        **({names.ANNOTATION_ROLLOUT: choice.why} if choice.why else {}),
        **(turned_back(back) if back else remembered(facts, spec, wanted_hash, model.status.last_served)),
        **upgrade_mark(facts, wanted_hash),
        **secrets_annotation(seen),
    }
    manifest["spec"] = {
        "replicas": spec.wanted_replicas,
        "selector": {"matchLabels": names.selector_labels(model.metadata.name)},
        "strategy": choice.strategy,
        "progressDeadlineSeconds": spec.start_seconds
        + termination_grace_seconds(spec)
        + PROGRESS_SLACK_SECONDS,
        "revisionHistoryLimit": 2,
        "template": template,
    }
    return manifest


def checked_template(model: VLLMModel, settings: Settings, facts: Facts) -> tuple[Manifest, str]:
    """The pod template with spec.podTemplate over it, and its hash, which tells pods' revisions.

    Raises SpecError where it is outside settings.policy.
    """
    spec, image = model.spec, engine_image(model, settings, facts)
    key = facts.engine_key
    secret = names.engine_key_secret(model.metadata.name, key) if key else ""
    base = pod_template(model, settings, image, secret)
    patch = spec.pod_template.model_dump(by_alias=True, exclude_unset=True) if spec.pod_template else {}
    template: Manifest = merged(base, patch)
    review = Review(
        policy=settings.policy,
        base=base,
        merged=template,
        default_image="" if spec.image else image,
        has_template=bool(patch),
        trusts_remote_code=spec.engine.trust_remote_code,
        extra_args=tuple(spec.engine.extra_args),
        env=tuple(item.name for item in spec.engine.env),
    )
    if problems := tuple(policy_problems(review)):
        raise SpecError(problems)
    template = with_secret_versions(template, versions_seen(template["spec"], facts))
    template_hash = digest(template)
    meta = template["metadata"]
    marks = {**meta.get("annotations", {}), names.ANNOTATION_TEMPLATE_HASH: template_hash}
    return {**template, "metadata": {**meta, "annotations": marks}}, template_hash


def spec_hash(spec: Spec) -> str:
    """Changes with every field that may ask for other pods."""
    return digest(spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=_NOT_OF_PODS))


def resized(wanted: Manifest, live: Manifest) -> Manifest:
    """The live Deployment with the wanted number of replicas, and nothing else of what is wanted."""
    said = live["metadata"].get("annotations") or {}
    ours = {key: value for key, value in said.items() if key.startswith(f"{names.GROUP}/")}
    ours.pop(names.ANNOTATION_HASH, None)
    kept = {"template": without_nulls(live["spec"]["template"]), "strategy": live["spec"]["strategy"]}
    metadata = {**wanted["metadata"], "annotations": ours}
    return stamped({**wanted, "metadata": metadata, "spec": {**wanted["spec"], **kept}})


def service_manifest(model: VLLMModel) -> Manifest:
    manifest = child("v1", "Service", model)
    port = {
        "name": names.ENGINE_PORT_NAME,
        "port": names.ENGINE_PORT,
        "protocol": "TCP",
        "targetPort": names.ENGINE_PORT_NAME,
    }
    manifest["spec"] = {
        "type": "ClusterIP",
        "selector": names.selector_labels(model.metadata.name),
        "ports": [port],
    }
    return manifest


def budget_manifest(model: VLLMModel) -> Manifest:
    """When nodes are drained, one pod after the other goes; one that does not serve holds nobody up.

    https://kubernetes.io/docs/tasks/run-application/configure-pdb/#unhealthy-pod-eviction-policy
    """
    manifest = child("policy/v1", "PodDisruptionBudget", model)
    manifest["spec"] = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": names.selector_labels(model.metadata.name)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return manifest


def network_policy_manifest(model: VLLMModel, peers: Iterable[Peer]) -> Manifest:
    """Ingress alone: an engine downloads its weights from wherever the spec says."""
    manifest = child("networking.k8s.io/v1", "NetworkPolicy", model)
    allowed = [
        {
            "namespaceSelector": {"matchLabels": dict(peer.namespace_labels)},
            "podSelector": {"matchLabels": dict(peer.pod_labels)},
        }
        for peer in peers
    ]
    engines = {"matchLabels": names.selector_labels(model.metadata.name)}
    ingress: list[Manifest] = [{"from": allowed, "ports": [{"port": names.ENGINE_PORT, "protocol": "TCP"}]}]
    if model.spec.nodes > 1:  # the nodes of a group choose their ports among themselves
        engines = {"matchLabels": {names.LABEL_MODEL: model.metadata.name}}
        ingress.append({"from": [{"podSelector": engines}]})
    manifest["spec"] = {"podSelector": engines, "policyTypes": ["Ingress"], "ingress": ingress}
    return manifest


def engine_key_manifest(model: VLLMModel, key: str) -> Manifest:
    """Immutable: a new key gets a new Secret, so that pods of both revisions have theirs."""
    manifest = child("v1", "Secret", model, names.engine_key_secret(model.metadata.name, key))
    encoded = base64.b64encode(key.encode()).decode()
    return {**manifest, "immutable": True, "data": {names.ENGINE_KEY_FIELD: encoded}}


def stamped(manifest: Manifest) -> Manifest:
    """With the annotation that tells whether exactly this was rendered before."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.ANNOTATION_HASH: digest(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def child(api_version: str, kind: str, model: VLLMModel, name: str = "") -> Manifest:
    """A manifest without a spec; by default called `<model>-engine`."""
    meta = model.metadata
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": meta.name, "uid": meta.uid}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name or names.engine_name(meta.name),
            "namespace": meta.namespace,
            "labels": names.labels(meta.name, meta.uid),
            # Without blockOwnerDeletion, which would need the right to update the model's finalizers.
            "ownerReferences": [{**owner, "controller": True}],
        },
    }
