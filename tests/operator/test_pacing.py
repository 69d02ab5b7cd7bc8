"""When a status is written: news at once, the same in other words a moment later.

Proves: the first status, readiness won and lost, trouble, a refusal and an edit are written at once; a step
of a start, a message and a number of pods wait, at most a second from the first of them however many follow,
and what is written then is the newest, once; what is as it was again is not written; a model that goes
meanwhile gets no status and leaves nothing behind; a write that fails is due at once when it is tried again;
an operator that stops with a status held leaves it to the next one; a refusal's other words do not wait for
its retry; a status for a model that is gone, or another by now, ends the work on it, and any other conflict
is tried again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_clock import FakeClock, eventually
from kube_api import VLLM_MODELS, KubeApi
from operator_rig import DEPLOYMENTS, KEY, PODS, SERVICES, Rig, make_rig
from vllm_models import model_body

from vllm_operator.api.status import Condition, Reason, Status
from vllm_operator.errors import Conflict, Unavailable
from vllm_operator.pacing import HOLD_SECONDS, Pacing, is_news
from vllm_operator.reconcile import REFUSED_RETRY_SECONDS
from vllm_operator.settings import Settings


@pytest.fixture
async def slow(api: KubeApi) -> AsyncIterator[Rig]:
    """A rig that holds statuses as the operator does."""
    async with make_rig(api, Settings(), hold_seconds=HOLD_SECONDS) as made:
        yield made


def told(reason: Reason = Reason.STARTING, message: str = "", ready: bool = False, **more: Any) -> Status:
    condition = Condition(
        type="Ready",
        status="True" if ready else "False",
        reason=reason,
        message=message,
        last_transition_time="t",
    )
    return Status(observed_generation=1, conditions=(condition,), **more)


@pytest.mark.parametrize(
    "after",
    [
        told(Reason.SERVING, ready=True),
        told(Reason.CRASH_LOOPING),
        told(Reason.INSUFFICIENT_GPU),
        told(served_names=("m",)),
        told(image="other"),
        told(gpus=2),
        told().model_copy(update={"observed_generation": 2}),
        Status(),
    ],
)
def test_what_is_news(after: Status) -> None:
    assert is_news(told(), after)
    assert is_news(after, told())


@pytest.mark.parametrize(
    "after", [told(message="other words"), told(Reason.PULLING), told(replicas=2, ready_replicas=1)]
)
def test_what_is_the_same_in_other_words(after: Status) -> None:
    assert not is_news(told(), after)


def test_every_reason_of_trouble_is_news() -> None:
    held = {reason.value for reason in Reason if not is_news(told(), told(reason))}
    assert held == {"Starting", "Pulling", "Downloading", "Loading", "Draining", "FormerObject"}


def test_the_wait_is_counted_from_the_first_change(clock: FakeClock) -> None:
    pacing, before = Pacing(clock, 1.0), told()
    for passed, left in ((0.0, 1.0), (0.4, 0.6), (0.9, 0.1), (1.0, 0.0), (5.0, 0.0)):
        clock.time = 1000 + passed
        assert pacing.hold(KEY, before, told(message=f"after {passed}")) == pytest.approx(left)
    pacing.forget(KEY)
    assert pacing.hold(KEY, before, told(message="anew")) == 1.0


async def test_a_start_is_told_at_once_and_its_steps_together(slow: Rig) -> None:
    slow.model()
    await slow.reconcile()
    assert slow.writes() == ["POST services", "POST deployments", "PATCH status"]
    slow.pod(ready=False)
    assert 0 < (await slow.reconcile() or 0) <= HOLD_SECONDS
    assert slow.writes() == []
    running = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    slow.api.patch_status(PODS, "ns", "p", {"containerStatuses": [running]})
    assert 0 < (await slow.reconcile() or 0) <= HOLD_SECONDS
    assert slow.writes() == []
    slow.clock.ahead += HOLD_SECONDS
    assert await slow.reconcile() is None
    assert slow.writes() == ["PATCH status"]
    assert slow.condition("Ready")[:2] == ("False", "Loading")
    await slow.reconcile()
    assert slow.api.requests == []


async def test_readiness_and_trouble_do_not_wait(slow: Rig) -> None:
    slow.model()
    await slow.reconcile()
    slow.pod(ready=False)
    await slow.reconcile()
    for conditions, found in (
        ([{"type": "Ready", "status": "True"}], ("True", "Serving")),
        ([{"type": "Ready", "status": "False"}], ("False", "Starting")),
        ([{"type": "PodScheduled", "status": "False", "message": "no"}], ("False", "Unschedulable")),
    ):
        slow.api.patch_status(PODS, "ns", "p", {"conditions": conditions})
        await slow.reconcile()
        assert slow.condition("Ready")[:2] == found
    slow.edit(engine={"extraArgs": ["--port=1"]})
    await slow.reconcile()
    assert slow.condition("Accepted")[:2] == ("False", "InvalidSpec")


async def test_what_is_as_it_was_again_is_not_written(slow: Rig) -> None:
    slow.model()
    await slow.reconcile()
    slow.pod(ready=False)
    await slow.reconcile()
    slow.api.delete(PODS, "ns", "p")
    slow.clock.ahead += HOLD_SECONDS
    assert await slow.reconcile() is None
    assert slow.writes() == []
    slow.pod(ready=False)
    assert (await slow.reconcile() or 0) > HOLD_SECONDS / 2, "the wait begins anew"


async def test_a_model_that_goes_leaves_nothing_behind(slow: Rig) -> None:
    slow.model()
    await slow.reconcile()
    slow.pod(ready=False)
    await slow.reconcile()
    slow.api.delete(VLLM_MODELS, "ns", "m")
    slow.clock.ahead += HOLD_SECONDS
    assert await slow.reconcile() is None
    assert (slow.writes(), slow.results[-1]) == ([], "gone")
    assert not slow._reconciler._pacing._due


async def test_a_write_that_fails_is_due_when_it_is_tried_again(slow: Rig) -> None:
    slow.model()
    await slow.reconcile()
    slow.pod(ready=False)
    await slow.reconcile()
    slow.clock.ahead += HOLD_SECONDS
    slow.api.fault("PATCH", "/status", 503)
    with pytest.raises(Unavailable):
        await slow.reconcile()
    await slow.reconcile()
    assert slow.condition("Ready")[2] == "the pod waits for its node"


async def test_the_next_operator_tells_what_one_held_when_it_stopped(api: KubeApi) -> None:
    async with make_rig(api, Settings(), hold_seconds=HOLD_SECONDS) as one:
        one.model()
        await one.reconcile()
        one.pod(ready=False)
        await one.reconcile()
        said = one.condition("Ready")[2]
    async with make_rig(api, Settings(), hold_seconds=HOLD_SECONDS) as two:
        assert 0 < (await two.reconcile() or 0) <= HOLD_SECONDS
        two.clock.ahead += HOLD_SECONDS
        await two.reconcile()
        assert two.condition("Ready")[2] == "the pod waits for its node" != said


async def test_a_refusals_other_words_come_soon(slow: Rig) -> None:
    slow.api.create(SERVICES, "ns", {"metadata": {"name": "m-engine"}, "spec": {"a": 1}})
    slow.model()
    assert await slow.reconcile() == REFUSED_RETRY_SECONDS
    slow.api.delete(SERVICES, "ns", "m-engine")
    slow.api.create(DEPLOYMENTS, "ns", {"metadata": {"name": "m-engine"}, "spec": {"a": 1}})
    assert 0 < (await slow.reconcile() or 0) <= HOLD_SECONDS
    slow.clock.ahead += HOLD_SECONDS
    assert await slow.reconcile() == REFUSED_RETRY_SECONDS
    assert "a Deployment named m-engine exists" in slow.condition("Ready")[2]


async def test_a_new_model_is_not_asked_for_and_found_gone_with_its_first_status(rig: Rig) -> None:
    rig.model()
    bodies = rig.api.objects(VLLM_MODELS)
    rig.api.delete(VLLM_MODELS, "ns", "m")
    rig.world.fleet.replace(bodies, rig.api.store.version)  # the deletion was missed
    rig.api.requests.clear()
    await rig._reconciler(KEY)
    assert rig.writes() == ["POST services", "POST deployments", "PATCH status"]
    assert (rig.results[-1], KEY in rig.world.fleet.models) == ("gone", False)
    rig.api.requests.clear()
    await rig._reconciler(KEY)  # its children are collected, and seen to go
    assert rig.api.requests == []


async def test_a_status_for_another_model_of_the_name_is_not_written(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    bodies = rig.api.objects(VLLM_MODELS)
    rig.api.delete(VLLM_MODELS, "ns", "m")
    await eventually(lambda: not rig.world.owned_children(KEY, bodies[0]["metadata"]["uid"]))
    rig.api.create(VLLM_MODELS, "ns", model_body())
    rig.world.fleet.replace([{**bodies[0], "status": {}}], rig.api.store.version)
    await rig._reconciler(KEY)
    assert rig.results[-1] == "gone"
    assert not rig.status()


async def test_a_conflict_of_a_model_that_lives_is_tried_again(rig: Rig) -> None:
    rig.model()
    rig.api.fault("PATCH", "/status", 409, message="the object has been modified")
    with pytest.raises(Conflict):
        await rig.reconcile()
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("False", "Starting")
