"""A replica on several nodes: a LeaderWorkerSet, whose leaders serve and whose workers only compute.

vLLM's own processes find each other (`--nnodes`, `--node-rank`, `--master-addr`; no Ray). If one pod of a
group restarts, all do: what they compute together cannot go on without one. https://lws.sigs.k8s.io/docs/
"""

from __future__ import annotations

from typing import Any

from vllm_operator import names
from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.render.annotations import secrets_annotation
from vllm_operator.render.args import worker_args
from vllm_operator.render.facts import Facts, Manifest
from vllm_operator.render.rollout import rollout_choice
from vllm_operator.render.secrets import versions_seen
from vllm_operator.render.workload import checked_template, child
from vllm_operator.settings import Settings

WORKLOADS = ("Deployment", "LeaderWorkerSet")
# Only the leader serves.
_LEADERS_OWN = ("ports", "startupProbe", "readinessProbe", "livenessProbe")
# A worker that ends takes the leader's streams with it: it stays until the leader's port is closed.
_AFTER_THE_LEADER = f"""\
import os, socket, time
leader = (os.environ["LWS_LEADER_ADDRESS"], {names.ENGINE_PORT})
try:
    while True:
        socket.create_connection(leader, 5).close()
        time.sleep(1)
except OSError:
    pass
"""


def pod_template_of(workload: Manifest) -> Manifest:
    """The template of the pods that serve."""
    spec = workload["spec"]
    template: Manifest = spec.get("template") or spec["leaderWorkerTemplate"]["leaderTemplate"]
    return template


def group_manifest(model: VLLMModel, settings: Settings, facts: Facts) -> Manifest:
    spec = model.spec
    leader, template_hash = checked_template(model, settings, facts)
    choice = rollout_choice(spec, leader["spec"], facts, template_hash)
    said = {names.ANNOTATION_ROLLOUT: choice.why} if choice.why else {}
    manifest = child(
        "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", model, names.group_name(model.metadata.name)
    )
    manifest["metadata"]["annotations"] = {
        names.ANNOTATION_TEMPLATE_HASH: template_hash,
        **said,
        **secrets_annotation(versions_seen(leader["spec"], facts)),
    }
    manifest["spec"] = {
        "replicas": spec.wanted_replicas,
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": choice.strategy["rollingUpdate"],
        },
        "leaderWorkerTemplate": {
            "size": spec.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": _worker_template(leader),
        },
    }
    return manifest


def _worker_template(leader: Manifest) -> Manifest:
    meta, spec = leader["metadata"], leader["spec"]
    engine, *others = spec["containers"]
    worker: dict[str, Any] = {key: value for key, value in engine.items() if key not in _LEADERS_OWN}
    worker["args"] = worker_args(engine["args"])
    worker["lifecycle"] = {"preStop": {"exec": {"command": ["python3", "-c", _AFTER_THE_LEADER]}}}
    return {
        **leader,
        "metadata": {**meta, "labels": {**meta["labels"], names.LABEL_COMPONENT: names.WORKER}},
        "spec": {**spec, "containers": [worker, *others]},
    }
