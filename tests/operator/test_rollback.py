"""Rollback: what last served comes back where a rollout fails and nothing else serves.

Proves: in place, a new revision that crashes, cannot be pulled, is refused by a quota or does not serve in
startTimeout gives way to the pod template that last served, byte for byte; the status says which generation
failed, why, and which serves; it is not tried again, not even by an operator that starts anew; an edit ends
it, and replicas do not; a changed spec that fails too returns to the same; nothing is taken back while pods
of another revision live, for a first revision, with rollback Never, or where the revision has served before;
waits that may pass are waited for; what served under another engine key is neither promised nor brought back;
a warning stands in the status before the serving pods are ended.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kube_api import Json, KubeApi
from operator_rig import DEPLOYMENTS, EVENTS, PODS, Rig, make_rig

from vllm_operator import names
from vllm_operator.settings import Settings

BAD = {"extraArgs": ["--no-such-flag"]}
WORDS = "vllm serve: error: unrecognized arguments: --no-such-flag"


def crashed(restarts: int = 2, words: str = WORDS) -> Json:
    last = {"terminated": {"exitCode": 2, "reason": "Error", "message": words}}
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    return {"name": "engine", "ready": False, "restartCount": restarts, "state": state, "lastState": last}


def waiting(reason: str, message: str) -> Json:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"name": "engine", "ready": False, "restartCount": 0, "state": state}


async def serving_then_edited(rig: Rig, **spec: Any) -> Json:
    """Serves generation 1, then generation 2 is applied. Returns the template of generation 1."""
    rig.model(**{"rollout": {"strategy": "InPlace"}} | spec)
    await rig.serve()
    good: Json = rig.deployment()["spec"]["template"]
    rig.edit(engine=BAD)
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    return good


async def failed(rig: Rig) -> Json:
    good = await serving_then_edited(rig)
    rig.replace_pods(containerStatuses=[crashed()])
    await rig.reconcile()
    return good


async def test_a_revision_that_crashes_gives_way_to_the_last_that_served(rig: Rig) -> None:
    good = await failed(rig)
    assert rig.deployment()["spec"]["template"] == good
    ready, reason, message = rig.condition("Ready")
    assert (ready, reason) == ("False", "RolledBack")
    assert message.startswith(f"generation 2 failed (WrongFlag: the engine ended with exit code 2: {WORDS}")
    assert "generation 1 comes back" in message
    rig.replace_pods(ready=True)
    await rig.reconcile()
    for kind in ("Ready", "Stalled"):
        assert rig.condition(kind)[:2] == ("True", "RolledBack")
        assert "generation 1 serves again. Edit the spec" in rig.condition(kind)[2]
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")
    assert rig.status()["lastServed"]["generation"] == 1
    assert "RolledBack" in [event["reason"] for event in rig.api.objects(EVENTS)]
    await rig.reconcile()
    assert rig.writes() == []


async def test_what_failed_is_not_tried_again_even_by_a_new_operator(rig: Rig, api: KubeApi) -> None:
    good = await failed(rig)
    for ready in (False, True):  # also while the old one is not up again, and whatever it meets
        rig.replace_pods(ready=ready, **({} if ready else {"containerStatuses": [crashed(9)]}))
        async with make_rig(api, Settings()) as other:
            other.clock.ahead = 7200
            await other.reconcile()
            await other.reconcile()
            assert other.deployment()["spec"]["template"] == good
            assert other.writes() == []


async def test_an_edit_ends_it_and_one_that_fails_too_returns_to_the_same(rig: Rig) -> None:
    good = await failed(rig)
    rig.replace_pods(ready=True)
    await rig.reconcile()
    rig.edit(engine={"extraArgs": ["--neither"]})
    await rig.reconcile()
    assert "--neither" in rig.engine()["args"]
    assert names.ANNOTATION_ROLLED_BACK not in rig.annotations()
    rig.replace_pods(containerStatuses=[crashed()])
    await rig.reconcile()
    assert rig.deployment()["spec"]["template"] == good
    rig.edit(engine=None)
    await rig.reconcile()
    assert names.ANNOTATION_ROLLED_BACK not in rig.annotations()
    rig.replace_pods(ready=True)
    await rig.reconcile()
    assert rig.condition("Ready") == ("True", "Serving", "1 of 1 replicas serve")
    assert rig.status()["lastServed"]["generation"] == 4
    await rig.reconcile()
    assert rig.writes() == []


async def test_replicas_are_no_new_try(rig: Rig) -> None:
    good = await failed(rig)
    rig.edit(replicas=3)
    await rig.reconcile()
    assert rig.deployment()["spec"]["replicas"] == 3
    assert rig.deployment()["spec"]["template"] == good


async def test_rollback_never_tries_the_newest_again(rig: Rig) -> None:
    await failed(rig)
    rig.edit(rollout={"strategy": "InPlace", "rollback": "Never"})
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    assert names.ANNOTATION_LAST_GOOD not in rig.annotations()
    rig.replace_pods(containerStatuses=[crashed(9)])
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    assert rig.condition("Stalled")[:2] == ("True", "WrongFlag")


PULL = waiting("ImagePullBackOff", 'Back-off pulling image "x": ErrImagePull: no such image')
SECRET = waiting("CreateContainerConfigError", 'secret "hf" not found')
RUNNING = {"name": "engine", "ready": False, "restartCount": 0, "state": {"running": {}}}


@pytest.mark.parametrize(
    ("container", "patient", "why"),
    [
        (PULL, 120, "ImagePullFailed: no such image"),
        (SECRET, 120, 'MissingSecret: secret "hf" not found'),
        (crashed(1, "KeyError: 'x'"), 600, "CrashLooping: the engine ended with exit code 2: KeyError: 'x'"),
        (RUNNING, 600, "Loading: the engine loads the model"),
    ],
)
async def test_what_may_pass_is_waited_for(rig: Rig, container: Json, patient: int, why: str) -> None:
    good = await serving_then_edited(rig, startTimeout="10m")
    rig.replace_pods(containerStatuses=[container])
    again = await rig.reconcile()
    assert again is not None
    assert patient - 60 < again <= patient
    assert rig.condition("Reconciling")[0] == "True"  # no person is needed yet
    assert "--no-such-flag" in rig.engine()["args"]
    rig.clock.ahead = patient + 1
    await rig.reconcile()
    assert rig.deployment()["spec"]["template"] == good
    assert f"generation 2 failed ({why}" in rig.condition("Ready")[2]


async def test_pods_that_a_quota_refuses_count_from_when_they_were(rig: Rig) -> None:
    good = await serving_then_edited(rig)
    for body in rig.api.objects(PODS, "ns"):
        rig.api.delete(PODS, "ns", body["metadata"]["name"])
    refused = 'pods "m-engine-1-2" is forbidden: exceeded quota: gpus'
    moment = rig.clock.now().isoformat()
    failure = {"type": "ReplicaFailure", "status": "True", "message": refused, "lastTransitionTime": moment}
    rig.api.patch_status(DEPLOYMENTS, "ns", "m-engine", {"conditions": [failure]})
    await rig.reconcile()
    assert rig.condition("Reconciling")[:2] == ("True", "QuotaExceeded")
    rig.clock.ahead = 121
    await rig.reconcile()
    assert rig.deployment()["spec"]["template"] == good


async def test_nothing_is_taken_back_while_pods_of_another_revision_live(rig: Rig) -> None:
    await serving_then_edited(rig)
    rig.pod("new", ready=False, containerStatuses=[crashed(9)])  # beside the old one
    rig.clock.ahead = 7200
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    assert rig.condition("Ready")[:2] == ("True", "RollingOut")


async def test_a_first_revision_has_nothing_to_return_to(rig: Rig) -> None:
    rig.model(engine=BAD)
    await rig.reconcile()
    rig.pod(ready=False, containerStatuses=[crashed(9)])
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    rig.edit(engine=None)  # the bad one is not what an edit returns to either
    await rig.reconcile()
    assert names.ANNOTATION_LAST_GOOD not in rig.annotations()


async def test_a_revision_that_has_served_is_never_taken_back(rig: Rig) -> None:
    await serving_then_edited(rig)
    rig.replace_pods(ready=True)
    await rig.reconcile()
    rig.replace_pods(containerStatuses=[crashed(9)])
    rig.clock.ahead = 7200
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    assert rig.condition("Stalled")[1] == "WrongFlag"


async def test_a_paused_model_is_not_taken_back(rig: Rig) -> None:
    await serving_then_edited(rig)
    rig.pause()
    rig.replace_pods(containerStatuses=[crashed(9)])
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]


async def test_the_way_back_survives_a_memory_that_somebody_edited(rig: Rig) -> None:
    await serving_then_edited(rig)
    for text in ("{", "[]", '{"template": {}}', '{"generation": "x"}'):
        mark = {"metadata": {"annotations": {names.ANNOTATION_LAST_GOOD: text}}}
        rig.api.patch(DEPLOYMENTS, "ns", "m-engine", mark)
        rig.replace_pods(containerStatuses=[crashed(9)])
        await rig.reconcile()
        assert "--no-such-flag" in rig.engine()["args"]


async def test_who_looks_is_warned_before_the_serving_pods_are_ended(rig: Rig) -> None:
    rig.model()
    await rig.serve()
    rig.edit(engine={"maxModelLen": 2048})
    await rig.reconcile()
    assert rig.writes() == ["PATCH status", "PATCH deployments", "PATCH status"]
    warned = next(request for request in rig.api.writes() if request.path.endswith("/status")).body["status"]
    ready = next(item for item in warned["conditions"] if item["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "RollingOut")
    assert "; in place, since no node" in ready["message"]
    assert warned["observedGeneration"] == 1  # the edit is not acted on yet
    assert rig.status()["observedGeneration"] == 2
    assert "; if it fails, generation 1 comes back" in rig.condition("Ready")[2]


async def test_two_failures_at_once_are_one_rollback(rig: Rig) -> None:
    good = await serving_then_edited(rig, replicas=2)
    rig.replace_pods(containerStatuses=[crashed()])
    rig.pod("second", ready=False, containerStatuses=[crashed()])
    await rig.reconcile()
    await asyncio.gather(rig.reconcile(), rig.reconcile())
    assert rig.deployment()["spec"]["template"] == good


async def test_what_served_under_another_key_is_neither_promised_nor_brought_back(rig: Rig) -> None:
    """Callers have the new key by then: it would run and serve nobody."""
    rig.engine_key = "a" * 64
    rig.model(rollout={"strategy": "InPlace"})
    await rig.serve()
    rig.engine_key = "b" * 64
    rig.edit(engine=BAD)
    await rig.reconcile()
    assert "comes back" not in rig.condition("Ready")[2]
    rig.replace_pods(containerStatuses=[crashed()])
    await rig.reconcile()
    assert "--no-such-flag" in rig.engine()["args"]
    assert rig.condition("Stalled")[:2] == ("True", "WrongFlag")  # a person is needed: nothing comes back


async def test_what_served_under_the_same_key_comes_back(rig: Rig) -> None:
    rig.engine_key = "a" * 64
    good = await failed(rig)
    assert rig.deployment()["spec"]["template"] == good
