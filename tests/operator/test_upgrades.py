"""What the operator itself causes goes one model at a time: `settings.maxConcurrentRollouts`.

Proves: of several serving models whose pods would change without an edit, one is changed and the others say
UpgradePending and are left as they are; the next goes when the one before is complete; a new operator that
starts in the middle waits too, and so does one that takes over; an edit goes at once, as does a model that
serves nobody; a change of replicas, autoscaling or the gateway's fields is no such edit, and replicas alone
are changed; what is taken back by hand is an edit; one that fails or is taken back holds the others until it
is edited or deleted; a model that waits and is deleted, paused or made invalid gives its turn on; two
reconciles at once take one turn; the limit is the setting's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kube_api import VLLM_MODELS, Json, KubeApi
from operator_rig import DEPLOYMENTS, EVENTS, PODS, Rig, make_rig
from vllm_models import model_body

from vllm_operator import names
from vllm_operator.names import ModelKey
from vllm_operator.settings import Settings, parse_settings
from vllm_operator.upgrades import Upgrades, is_under_way

OLD = parse_settings({"profiles": {"p": {"resources": {"requests": {"cpu": "1"}}}}}, "test")
KEYS = [ModelKey("ns", name) for name in ("a", "b", "c")]


def newer(**changes: Any) -> Settings:
    return parse_settings({"profiles": {"p": {"resources": {"requests": {"cpu": "2"}}}}} | changes, "test")


async def three_serving(api: KubeApi) -> None:
    async with make_rig(api, OLD) as rig:
        for key in KEYS:
            api.create(VLLM_MODELS, "ns", model_body(key.name, profile="p"))
            await rig.reconcile(key)
            rig.pod(key.name, model=key.name)
            await rig.reconcile(key)
            complete(api, key)


def complete(api: KubeApi, key: ModelKey, **status: Any) -> None:
    """As the Deployment's controller tells it."""
    body = api.get(DEPLOYMENTS, "ns", f"{key.name}-engine")
    wanted = body["spec"]["replicas"]
    counts = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), wanted)
    status = {"observedGeneration": body["metadata"]["generation"], **counts} | status
    api.patch_status(DEPLOYMENTS, "ns", f"{key.name}-engine", status)


def cpu(api: KubeApi) -> list[str]:
    """What each model's pods ask for: 1 before, 2 after."""
    bodies = [api.get(DEPLOYMENTS, "ns", f"{key.name}-engine") for key in KEYS]
    engines = [body["spec"]["template"]["spec"]["containers"][0] for body in bodies]
    return [engine["resources"]["requests"]["cpu"] for engine in engines]


async def every(rig: Rig) -> None:
    for key in KEYS:
        await rig.reconcile(key)


async def test_one_is_changed_and_the_others_wait(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        assert cpu(api) == ["2", "1", "1"]
        for key in KEYS[1:]:
            assert rig.condition("Reconciling", key)[:2] == ("True", "UpgradePending")
            assert "settings.maxConcurrentRollouts" in rig.condition("Reconciling", key)[2]
            assert rig.condition("Ready", key)[:2] == ("True", "Serving")
        assert rig.condition("Ready", KEYS[0])[:2] == ("True", "RollingOut")
        await rig.reconcile(KEYS[1])
        assert rig.writes() == []
        rig.enqueued.clear()
        complete(api, KEYS[0])
        await rig.caught_up()
        assert KEYS[1] in rig.enqueued
        await every(rig)
        assert cpu(api) == ["2", "2", "1"]
        complete(api, KEYS[1])
        await every(rig)
        assert cpu(api) == ["2", "2", "2"]
    warned = [event["reason"] for event in api.objects(EVENTS) if event["type"] == "Warning"]
    assert warned == []


async def test_the_next_operator_knows_of_the_one_that_is_under_way(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await rig.reconcile(KEYS[2])
    async with make_rig(api, newer()) as rig:
        await every(rig)
        assert cpu(api) == ["1", "1", "2"]
        complete(api, KEYS[2])
        await every(rig)
        assert cpu(api) == ["2", "1", "2"]


async def test_an_edit_goes_at_once_and_is_no_upgrade(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"engine": {"maxModelLen": 2048}}})
        await rig.reconcile(KEYS[1])
        assert cpu(api) == ["2", "2", "1"]
        assert names.ANNOTATION_UPGRADE not in rig.annotations(KEYS[1])
        assert names.ANNOTATION_UPGRADE in rig.annotations(KEYS[0])


async def test_a_change_of_replicas_does_not_let_a_waiting_upgrade_through(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        before = rig.deployment(KEYS[1])["spec"]
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"replicas": 3, "gateway": {"maxInFlight": 9}}})
        await rig.reconcile(KEYS[1])
        assert rig.deployment(KEYS[1])["spec"] == before | {"replicas": 3}
        assert rig.condition("Reconciling", KEYS[1])[0] == "True"
        assert "upgrade" not in str(rig.annotations(KEYS[1]))
        await rig.reconcile(KEYS[1])
        assert rig.writes() == []
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"replicas": 0}})
        await rig.reconcile(KEYS[1])
        assert rig.deployment(KEYS[1])["spec"]["replicas"] == 0
    async with make_rig(api, newer()) as rig:  # an operator that starts anew sees it alike
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"replicas": 1}})
        await every(rig)
        assert cpu(api) == ["2", "1", "1"]
        complete(api, KEYS[0])
        await every(rig)
        assert cpu(api) == ["2", "2", "1"]
        assert rig.deployment(KEYS[1])["spec"]["replicas"] == 1
        assert rig.annotations(KEYS[1])[names.ANNOTATION_UPGRADE]


async def test_an_edit_that_is_taken_back_by_hand_does_not_wait(api: KubeApi) -> None:
    """It asks for the pods that served last, and others are being made."""
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"engine": {"maxModelLen": 2048}}})
        await rig.reconcile(KEYS[1])
        api.patch(VLLM_MODELS, "ns", "b", {"spec": {"engine": None}})
        await rig.reconcile(KEYS[1])
        assert "--max-model-len" not in rig.engine(KEYS[1])["args"]
        assert names.ANNOTATION_UPGRADE not in rig.annotations(KEYS[1])


async def test_a_model_that_serves_nobody_is_changed_at_once(api: KubeApi) -> None:
    await three_serving(api)
    api.delete(PODS, "ns", "b")
    async with make_rig(api, newer()) as rig:
        await every(rig)
        assert cpu(api) == ["2", "2", "1"]


@pytest.mark.parametrize("ending", ["edited", "deleted"])
async def test_one_that_does_not_come_up_spares_the_others(api: KubeApi, ending: str) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        complete(api, KEYS[0], availableReplicas=0)
        await every(rig)
        assert cpu(api) == ["2", "1", "1"]
        if ending == "deleted":
            api.delete(VLLM_MODELS, "ns", "a")
            await rig.reconcile(KEYS[0])
        else:
            api.patch(VLLM_MODELS, "ns", "a", {"spec": {"engine": {"maxModelLen": 2048}}})
            await rig.reconcile(KEYS[0])
        await rig.reconcile(KEYS[1])
        assert rig.engine(KEYS[1])["resources"]["requests"]["cpu"] == "2"


async def test_one_that_was_taken_back_goes_on_counting() -> None:
    marks = {names.ANNOTATION_UPGRADE: "x"}
    body: Json = {"metadata": {"annotations": marks, "generation": 2}, "spec": {"replicas": 1}}
    assert is_under_way(body)
    done = dict.fromkeys(("observedGeneration", "replicas", "updatedReplicas", "availableReplicas"), 1)
    assert is_under_way(body | {"status": done})  # its controller has not seen it yet
    assert not is_under_way(body | {"status": done | {"observedGeneration": 2}})
    marks[names.ANNOTATION_ROLLED_BACK] = "{}"
    assert is_under_way(body | {"status": done | {"observedGeneration": 2}})
    del marks[names.ANNOTATION_UPGRADE]
    assert not is_under_way(body)


@pytest.mark.parametrize("change", ["paused", "invalid", "deleted"])
async def test_a_model_that_waits_no_more_gives_its_turn_on(api: KubeApi, change: str) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await every(rig)
        complete(api, KEYS[0])
        await rig.caught_up()
        if change == "deleted":
            api.delete(VLLM_MODELS, "ns", "b")
        elif change == "paused":
            rig.pause("b")
        else:
            api.patch(VLLM_MODELS, "ns", "b", {"spec": {"engine": {"extraArgs": ["--port=1"]}}})
        rig.enqueued.clear()
        await rig.reconcile(KEYS[1])
        assert KEYS[2] in rig.enqueued
        await rig.reconcile(KEYS[2])
        assert rig.engine(KEYS[2])["resources"]["requests"]["cpu"] == "2"


async def test_the_limit_is_the_settings(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer(maxConcurrentRollouts=2)) as rig:
        await every(rig)
        assert cpu(api) == ["2", "2", "1"]


async def test_reconciles_at_once_take_one_turn(api: KubeApi) -> None:
    await three_serving(api)
    async with make_rig(api, newer()) as rig:
        await rig.caught_up()
        await asyncio.gather(*(rig.reconcile(key) for key in KEYS))
        assert sorted(cpu(api)) == ["1", "1", "2"]


def test_a_refused_apply_gives_the_turn_on() -> None:
    told: list[ModelKey] = []
    upgrades = Upgrades(1, told.append)
    a, b, c = KEYS
    assert upgrades.enter(a)
    assert upgrades.enter(a)
    assert not upgrades.enter(b)
    assert not upgrades.enter(c)
    upgrades.leave(a)  # and no Deployment tells of a rollout
    assert told == [b]
    upgrades.forget(b)
    assert told == [b, c]
    assert upgrades.enter(c)
    upgrades.leave(c)
    upgrades.leave(c)
    upgrades.forget(b)
    assert told == [b, c]
