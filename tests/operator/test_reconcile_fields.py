"""Fields with objects or names of their own, reconciled one step at a time against the fake API server.

Proves: an adapter's name is granted or denied like a model's; pods wait for a prefetch that is told of, and
then nothing is written; a Job that can make no pod says who refuses it; replicas do not wait for weights;
other weights are fetched while the old ones serve; a Job that cannot succeed is made anew after an edit; a
claim outlives its field, comes back when deleted, grows, and is never sent what cannot change; what an edit
takes out goes from the children.
"""

from __future__ import annotations

from typing import Any

from kube_api import VLLM_MODELS, Json, resource
from operator_rig import KEY, Rig
from vllm_models import model_body

JOBS, CLAIMS, PODS = resource("jobs"), resource("persistentvolumeclaims"), resource("pods")


QUOTA = 'Error creating: pods "m-prefetch-1-x" is forbidden: exceeded quota: small'


def refuse_job(rig: Rig, at: str, message: str = QUOTA) -> None:
    """As the Job's controller tells that it cannot make its pod: no condition of the Job does."""
    meta = job(rig)["metadata"]
    about = {"kind": "Job", "namespace": "ns", "name": meta["name"], "uid": meta["uid"]}
    said = {"involvedObject": about, "type": "Warning", "reason": "FailedCreate", "message": message}
    name = {"metadata": {"name": f"e-{rig.api.store.version}"}}
    rig.api.create(resource("events"), "ns", name | said | {"lastTimestamp": at})


async def test_a_job_that_can_make_no_pod_says_who_refuses_it(rig: Rig) -> None:
    rig.model(cache=PREFETCH)
    await rig.reconcile()
    rig.enqueued.clear()
    refuse_job(rig, "2026-01-01T00:00:00Z", "Error creating: something that has passed")
    refuse_job(rig, "2026-01-01T00:00:01Z")
    await rig.caught_up()
    assert KEY in rig.enqueued
    await rig.reconcile()
    assert rig.condition("Stalled")[:2] == ("True", "QuotaExceeded")
    assert (
        "the download's pod is refused: exceeded quota: small; it asks for 500m cpu"
        in rig.condition("Ready")[2]
    )
    prefetch_pod(rig, phase="Pending")
    await rig.reconcile()
    assert rig.condition("Ready")[1] == "Starting"  # an Event stays for an hour


async def test_replicas_do_not_wait_for_weights(rig: Rig) -> None:
    rig.model(cache=PREFETCH | {"accessModes": ["ReadWriteMany"]})
    await rig.reconcile()
    end_job(rig)
    await rig.serve()
    await rig.reconcile()
    before = rig.deployment()["spec"]
    rig.edit(source={"huggingFace": {"revision": "v2"}}, replicas=3)
    await rig.reconcile()
    assert rig.deployment()["spec"] == before | {"replicas": 3}
    assert rig.condition("Reconciling")[1] == "Downloading"
    await rig.reconcile()
    assert "PATCH deployments" not in rig.writes()
    end_jobs(rig)
    await rig.reconcile()
    assert "v2" in str(rig.deployment()["spec"]["template"])
    await rig.reconcile()
    assert rig.writes() == []


async def test_an_adapters_name_is_granted_by_the_same_rule(rig: Rig) -> None:
    old = model_body("old", "a", servedNames=["sql"])
    old["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    rig.api.create(VLLM_MODELS, "a", old)
    rig.model(adapters=[{"name": name, "source": {"local": {"path": "/a"}}} for name in ("sql", "chat")])
    await rig.reconcile()
    assert rig.status()["adapters"] == ["chat"]
    assert rig.status()["servedNames"] == ["m"]
    assert rig.condition("Accepted")[:2] == ("False", "NameConflict")
    assert (
        "sql is held by the older model a/old. Ask for ns/m (ns/m:<adapter>" in rig.condition("Accepted")[2]
    )
    args = rig.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"sql=/a", "chat=/a"} <= set(args)  # by its full name the engine still has it


PREFETCH = {"size": "10Gi", "prefetch": True}


def job(rig: Rig) -> Json:
    (found,) = rig.api.objects(JOBS)
    return found


def end_job(rig: Rig) -> None:
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    rig.api.patch_status(JOBS, "ns", job(rig)["metadata"]["name"], done)


def end_jobs(rig: Rig) -> None:
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    for body in rig.api.objects(JOBS):
        rig.api.patch_status(JOBS, "ns", body["metadata"]["name"], done)


def prefetch_pod(rig: Rig, **status: Any) -> None:
    template = job(rig)["spec"]["template"]
    body = {
        "metadata": {"name": "p-prefetch", **template["metadata"]},
        "spec": template["spec"],
        "status": status,
    }
    rig.api.create(PODS, "ns", body)


async def test_pods_wait_for_the_weights_and_then_nothing_is_written(rig: Rig) -> None:
    rig.model(cache=PREFETCH)
    await rig.reconcile()
    assert rig.writes() == ["POST services", "POST persistentvolumeclaims", "POST jobs", "PATCH status"]
    assert rig.condition("Ready")[:2] == ("False", "Downloading")
    running = {"name": "fetch", "ready": False, "state": {"running": {"startedAt": "2026-01-01T12:00:00Z"}}}
    plan = {"name": "plan", "state": {"terminated": {"exitCode": 0, "message": "1.0 GB in 3 files"}}}
    prefetch_pod(rig, containerStatuses=[running], initContainerStatuses=[plan])
    await rig.reconcile()
    assert rig.condition("Reconciling")[1:] == ("Downloading", "1.0 GB in 3 files since 12:00:00 UTC")
    assert rig.status()["replicas"] == 0
    await rig.reconcile()
    assert rig.api.requests == []
    end_job(rig)
    await rig.reconcile()
    assert rig.writes() == ["POST deployments", "PATCH status"]
    rig.pod()
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("True", "Serving")
    await rig.reconcile()
    assert rig.api.requests == []


async def test_another_revision_is_fetched_while_the_old_one_serves(rig: Rig) -> None:
    rig.model(cache=PREFETCH)
    await rig.reconcile()
    end_job(rig)
    await rig.reconcile()
    rig.pod()
    first, before = job(rig)["metadata"]["name"], rig.deployment()
    rig.edit(source={"huggingFace": {"revision": "v2"}})
    await rig.reconcile()
    assert job(rig)["metadata"]["name"] != first
    assert rig.deployment() == before
    assert rig.condition("Ready")[:2] == ("True", "RollingOut")
    assert rig.condition("Reconciling")[1] == "Downloading"
    end_job(rig)
    await rig.reconcile()
    assert [write for write in rig.writes() if write != "PATCH status"] == ["PATCH deployments"]


async def test_a_job_that_failed_with_the_old_settings_is_made_anew_with_the_new(rig: Rig) -> None:
    rig.model(cache=PREFETCH)
    await rig.reconcile()
    refused = {"exitCode": 10, "message": "Hugging Face refuses org/small without a token"}
    prefetch_pod(rig, initContainerStatuses=[{"name": "plan", "state": {"terminated": refused}}])
    await rig.reconcile()
    assert rig.condition("Stalled")[1] == "ModelAccessDenied"
    assert "check source.huggingFace.tokenSecret" in rig.condition("Ready")[2]
    rig.edit(source={"huggingFace": {"tokenSecret": {"name": "hf"}}})
    await rig.reconcile()
    assert rig.api.objects(JOBS) == []
    await rig.reconcile()
    assert "HF_TOKEN" in str(job(rig))


async def test_the_claim_outlives_the_field_and_a_hand_that_removes_it(rig: Rig) -> None:
    rig.model(cache={"size": "10Gi"})
    await rig.reconcile()
    rig.edit(cache=None)
    await rig.reconcile()
    (claim,) = rig.api.objects(CLAIMS)
    assert claim["metadata"]["ownerReferences"][0]["name"] == "m"
    assert "cache" not in str(rig.deployment()["spec"]["template"]["spec"]["volumes"])
    rig.edit(cache={"size": "10Gi"})
    rig.api.delete(CLAIMS, "ns", "m-cache")
    await rig.reconcile()
    assert "POST persistentvolumeclaims" in rig.writes()


async def test_a_claim_is_grown_and_what_never_changes_is_not_sent(rig: Rig) -> None:
    rig.model(cache={"size": "10Gi", "storageClassName": "fast"})
    await rig.reconcile()
    rig.edit(cache={"size": "20Gi", "storageClassName": None})
    await rig.reconcile()
    (sent,) = [item for item in rig.api.writes() if "persistentvolumeclaims" in item.path]
    assert sent.body["spec"] == {"resources": {"requests": {"storage": "20Gi"}}}
    (claim,) = rig.api.objects(CLAIMS)
    assert claim["spec"]["storageClassName"] == "fast"
    rig.edit(cache={"size": "5Gi"})
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert rig.writes() == ["PATCH status"]


async def test_what_an_edit_takes_out_of_the_model_goes_from_its_children(rig: Rig) -> None:
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    rig.model(engine={"env": env}, scheduling={"nodeSelector": {"zone": "a"}})
    await rig.reconcile()
    rig.edit(engine={"env": env[:1]}, scheduling=None)
    await rig.reconcile()
    pod = rig.deployment()["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod
    assert "B" not in {item["name"] for item in pod["containers"][0]["env"]}
    rig.edit(engine=None)
    await rig.reconcile()
    assert "A" not in {
        item["name"] for item in rig.deployment()["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert rig.writes() == ["PATCH deployments", "PATCH status"]
    await rig.reconcile()
    assert rig.api.requests == []
