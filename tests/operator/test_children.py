"""How a model's objects are changed: all or none, and others' edits are set back and told.

Proves: where one object of an edit is refused (quota, policy, content), none of the others is touched, and
image, names and pods of before stay in the status with the server's words; an edit of one object alone costs
no trial, nor does a new model; a webhook that takes no trials is no refusal; names stay the refused model's,
so that no other namespace gets them meanwhile, and pass on once an edit without them is accepted; an Event
tells what another hand changed and to what it was set back, bounded, without values of variables, once; an
edit of ours, and an apply that changes nothing, are no drift.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_clock import eventually
from kube_api import VLLM_MODELS, KubeApi, resource
from operator_rig import DEPLOYMENTS, EVENTS, KEY, PODS, SERVICES, Rig
from vllm_models import model_body

from vllm_operator import kinds
from vllm_operator.compare import MAX_TOLD, difference_text
from vllm_operator.names import ModelKey

BUDGETS = resource("poddisruptionbudgets")
QUOTA = "exceeded quota: few, requested: count/poddisruptionbudgets.policy=1"


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (403, f'poddisruptionbudgets "m-engine" is forbidden: {QUOTA}', "QuotaExceeded"),
        (403, 'admission webhook "policy" denied the request: no', "QuotaExceeded"),
        (422, "PodDisruptionBudget is invalid: spec: bad", "InvalidSpec"),
    ],
)
async def test_a_refusal_of_one_object_touches_none(rig: Rig, code: int, message: str, reason: str) -> None:
    rig.model(servedNames=["old"], rollout={"strategy": "Surge"})
    await rig.serve()
    before, status = rig.deployment(), rig.status()
    rig.api.fault("POST", "/poddisruptionbudgets", code, message=message)
    rig.edit(replicas=2, servedNames=["new"], image="example.com/other:1")
    await rig.reconcile()
    assert rig.deployment() == before
    assert not rig.api.objects(BUDGETS)
    assert rig.writes() == ["POST poddisruptionbudgets", "PATCH status"]
    assert rig.condition("Accepted")[:2] == ("False", reason)
    assert message in rig.condition("Accepted")[2]
    assert rig.condition("Ready")[:2] == ("True", reason)
    kept = ("servedNames", "image", "gpus", "lastServed", "readyReplicas")
    assert {key: rig.status()[key] for key in kept} == {key: status[key] for key in kept}
    await rig.reconcile()
    assert rig.status()["servedNames"] == ["new"]
    assert rig.deployment()["spec"]["replicas"] == 2
    assert len(rig.api.objects(BUDGETS)) == 1


async def test_a_refused_deployment_is_the_last_thing_tried(rig: Rig) -> None:
    rig.model(replicas=2)
    await rig.reconcile()
    budget = rig.api.get(BUDGETS, "ns", "m-engine")
    rig.api.patch(BUDGETS, "ns", "m-engine", {"spec": {"maxUnavailable": 7}})
    rig.api.fault("PATCH", "/deployments", 422, message="Deployment is invalid: spec.template: bad")
    rig.edit(engine={"maxModelLen": 2048})
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert rig.api.get(BUDGETS, "ns", "m-engine")["spec"] != budget["spec"]  # not even that was set back
    assert "--max-model-len" not in rig.engine()["args"]


async def test_an_edit_of_one_object_and_a_new_model_cost_no_trial(rig: Rig) -> None:
    rig.model(replicas=2)
    await rig.reconcile()
    assert rig.writes() == ["POST services", "POST deployments", "POST poddisruptionbudgets", "PATCH status"]
    rig.edit(engine={"maxModelLen": 2048})
    await rig.reconcile()
    assert rig.writes() == ["PATCH deployments", "PATCH status"]
    rig.edit(replicas=1)
    await rig.reconcile()
    assert rig.writes() == ["PATCH deployments", "DELETE m-engine", "PATCH status"]


async def test_a_webhook_that_takes_no_trials_refuses_nothing(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    words = 'admission webhook "audit.example.com" does not support dry run'
    rig.api.fault("POST", "/poddisruptionbudgets", 400, message=words)
    rig.edit(replicas=2)
    await rig.reconcile()
    assert rig.deployment()["spec"]["replicas"] == 2
    assert len(rig.api.objects(BUDGETS)) == 1
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")


OTHER = ModelKey("z", "other")


@pytest.mark.parametrize(
    "refused", [{"engine": {"extraArgs": ["--port=1"]}}, {"engine": {"maxModelLen": 2048}}]
)
async def test_the_names_of_a_refused_edit_stay_its_own(rig: Rig, refused: dict[str, Any]) -> None:
    rig.model(servedNames=["chat"])
    await rig.reconcile()
    fault = rig.api.fault("PATCH", "/deployments", 422, message="bad", times=99)
    rig.edit(servedNames=["else"], **refused)
    await rig.reconcile()
    assert rig.status()["servedNames"] == ["chat"]
    rig.api.create(VLLM_MODELS, "z", model_body("other", "z", servedNames=["chat"]))
    await rig.reconcile(OTHER)
    assert rig.status(OTHER)["servedNames"] == []
    assert rig.condition("Accepted", OTHER)[1] == "NameConflict"
    await rig.reconcile()  # refused once more: they are not lost on the way
    assert rig.status()["servedNames"] == ["chat"]
    fault.times = 0
    rig.edit(engine=None)
    rig.enqueued.clear()
    await rig.reconcile()
    assert rig.status()["servedNames"] == ["else"]
    assert OTHER in rig.enqueued
    await rig.reconcile(OTHER)
    assert rig.status(OTHER)["servedNames"] == ["chat"]


# Drift


def told(rig: Rig) -> list[str]:
    return [event["message"] for event in rig.api.objects(EVENTS) if event["reason"] == "DriftRepaired"]


def edit_by_hand(rig: Rig, image: str = "by-hand", **spec: Any) -> None:
    containers = rig.deployment()["spec"]["template"]["spec"]["containers"]
    containers[0]["image"] = image
    patch = {"template": {"spec": {"containers": containers}}} | spec
    rig.api.patch(DEPLOYMENTS, "ns", "m-engine", {"spec": patch})


async def test_what_another_hand_changed_is_told(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    edit_by_hand(rig, replicas=7)
    await rig.reconcile()
    (message,) = told(rig)
    assert message.startswith(
        "set back what another hand changed: Deployment m-engine: spec.replicas: 7 → 1; "
    )
    assert message.endswith("containers[engine].image: by-hand → vllm/vllm-openai:v0.32.0")
    edit_by_hand(rig, replicas=7)
    await rig.reconcile()
    assert rig.deployment()["spec"]["replicas"] == 1
    assert len(told(rig)) == 1  # a fight over a field fills no store
    rig.clock.ahead = 700
    edit_by_hand(rig, replicas=7)
    await rig.reconcile()
    assert len(told(rig)) == 2


async def test_no_value_of_a_variable_is_told(rig: Rig) -> None:
    rig.model(engine={"env": [{"name": "MY_MODE", "value": "mine"}]})
    await rig.reconcile()
    containers = rig.deployment()["spec"]["template"]["spec"]["containers"]
    next(item for item in containers[0]["env"] if item["name"] == "MY_MODE")["value"] = "t0psecret"
    rig.api.patch(DEPLOYMENTS, "ns", "m-engine", {"spec": {"template": {"spec": {"containers": containers}}}})
    await rig.reconcile()
    (message,) = told(rig)
    assert message.endswith("containers[engine].env[MY_MODE].value: (hidden) → (hidden)")


async def test_of_many_new_models_all_have_their_pods_before_any_has_its_status(rig: Rig) -> None:
    rig.model()
    rig.crowded = True
    assert await rig.reconcile() == 0.0
    assert rig.writes() == ["POST services", "POST deployments"]
    await rig.reconcile()
    assert rig.writes() == ["PATCH status"]
    rig.api.delete(DEPLOYMENTS, "ns", "m-engine")
    await rig.reconcile()
    assert rig.deployment()


async def test_an_edit_and_an_absent_object_are_no_drift(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.edit(engine={"maxModelLen": 2048})
    await rig.reconcile()
    rig.api.delete(SERVICES, "ns", "m-engine")
    await rig.reconcile()
    assert rig.api.get(SERVICES, "ns", "m-engine")
    assert told(rig) == []


async def test_a_difference_that_the_server_does_not_see_is_no_drift(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    stale = rig.deployment()
    stale["spec"]["replicas"] = 5  # the table is behind: the live object has been set back already
    await rig.caught_up()
    rig.world._reflectors[kinds.DEPLOYMENTS, ""].table[kinds.ObjectKey("ns", "m-engine")] = stale
    rig.world.fleet.replace(rig.api.objects(VLLM_MODELS), rig.api.store.version)
    await rig._reconciler(KEY)
    assert told(rig) == []


def test_the_text_is_bounded() -> None:
    wanted = {"spec": {f"field{number}": "x" * 500 for number in range(50)}}
    text = difference_text(wanted, {"spec": {"field0": "y" * 500}})
    assert len(text) < 1000
    assert text.endswith(f"; and {50 - MAX_TOLD} more")
    assert text.startswith("spec.field0: yyy")


@pytest.mark.parametrize(
    ("wanted", "live", "text"),
    [
        ({"a": 1}, {}, "a: nothing → 1"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [2]}}, "a.b: [2] → [1, 2]"),
        ({"a": {"limits": {"cpu": "1"}}}, {"a": {"limits": {"cpu": "1000m"}}}, ""),
        ({"a": {"limits": {"cpu": "1"}}}, {"a": {"limits": {"cpu": "2"}}}, "a.limits.cpu: 2 → 1"),
        ({"env": [{"name": "A", "value": "s"}]}, {"env": []}, "env[A]: nothing → (hidden)"),
        ({"env": [{"name": "A", "value": "s"}]}, {"env": "x"}, "env: (hidden) → (hidden)"),
        ({"args": ["--api-key=s3cret"]}, {"args": []}, 'args: [] → ["--api-key=[redacted]"]'),
    ],
)
def test_a_difference_names_the_field(wanted: Any, live: Any, text: str) -> None:
    assert difference_text(wanted, live) == text


async def test_pods_are_never_listed_for_it(api: KubeApi, rig: Rig) -> None:
    """A reconcile reads tables: whatever it repairs, it asks the server for nothing."""
    rig.model()
    await rig.serve()
    edit_by_hand(rig)
    await rig.reconcile()  # the first apply to an object that was created looks at how its fields are booked
    edit_by_hand(rig)
    await rig.reconcile()
    assert [request.method for request in api.requests if request.method == "GET"] == []
    assert await eventually(lambda: api.objects(PODS))
