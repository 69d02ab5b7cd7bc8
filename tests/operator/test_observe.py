"""`observe`: from pods and a Deployment to conditions that say why.

Proves: a reason for each state of a pod, with the words of the scheduler, the kubelet or the engine; kstatus
(Reconciling and Stalled never both, absent when false, observedGeneration in the first write); trouble is
Stalled only after the start budget; a rollout whose old revision serves is Ready; refusals with and without
a serving revision; transition times stay while a status stays; the engine's last line is the telling one,
clipped and scrubbed.
"""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_models import model_body

from vllm_operator.api.parsing import parse
from vllm_operator.api.status import DESCRIPTIONS, Reason, Status
from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.observe import Refusal, Snapshot, observe, observe_refused, seconds_until_stalled
from vllm_operator.observe.engine_log import MAX_LINE, last_error_line, scrub

Json = dict[str, Any]
NOW = datetime.datetime(2026, 1, 1, 12, 0, tzinfo=datetime.UTC)
HASH = "current"
SCHEDULED = {"type": "PodScheduled", "status": "True"}
CUDA_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."

TRACEBACK = """\
(EngineCore pid=71) ERROR 11-22 22:40:02 [core.py:113] ValueError: No available memory for the cache.
(EngineCore pid=71) ERROR 11-22 22:40:02 [core.py:1137] Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


def model(**spec: Any) -> VLLMModel:
    return parse(model_body(**spec))


def pod(
    *containers: Json,
    ready: bool = False,
    template: str = HASH,
    age: float = 60,
    terminating: bool = False,
    **status: Any,
) -> Json:
    made = (NOW - datetime.timedelta(seconds=age)).isoformat()
    meta: Json = {"annotations": {"vllm-fleet.dev/template-hash": template}, "creationTimestamp": made}
    if terminating:
        meta["deletionTimestamp"] = made
    conditions = [{"type": "Ready", "status": str(ready)}, SCHEDULED]
    states = {"conditions": conditions, "startTime": made, "containerStatuses": list(containers)}
    return {"metadata": meta, "spec": {"nodeName": "gpu-1"}, "status": states | status}


def container(ready: bool = False, restarts: int = 0, last: Json | None = None, **state: Json) -> Json:
    return {
        "name": "engine",
        "ready": ready,
        "restartCount": restarts,
        "state": state,
        "lastState": {"terminated": last} if last else {},
    }


def serving(template: str = HASH) -> Json:
    return pod(container(ready=True, running={}), ready=True, template=template)


def unschedulable(message: str) -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(conditions=[condition])


def waiting(reason: str, message: str = "") -> Json:
    return container(waiting={"reason": reason, "message": message})


def dead(message: str, code: int = 1, reason: str = "Error") -> Json:
    return {"exitCode": code, "reason": reason, "message": message}


def status_of(*pods: Json, spec: Json | None = None, **snapshot: Any) -> Status:
    return observe(model(**spec or {}), Snapshot(pods=pods, template_hash=HASH, **snapshot), NOW)


def told(status: Status) -> dict[str, tuple[str, str]]:
    return {item.type: (item.status, item.reason) for item in status.conditions}


LOADING = container(running={"startedAt": "2026-01-01T11:59:30Z"})


@pytest.mark.parametrize(
    ("found", "reason", "words"),
    [
        (
            unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            Reason.INSUFFICIENT_GPU,
            "0/3 nodes",
        ),
        (
            unschedulable("0/3 nodes are available: 3 Insufficient cpu."),
            Reason.UNSCHEDULABLE,
            "3 Insufficient cpu",
        ),
        (
            unschedulable('0/1 nodes are available: persistentvolumeclaim "w" not found. not found'),
            Reason.MISSING_VOLUME,
            'persistentvolumeclaim "w" not found: create it',
        ),
        (
            pod(waiting("ContainerCreating")),
            Reason.PULLING,
            "gpu-1 pulls the image or mounts volumes since 11:59:00",
        ),
        (pod(), Reason.STARTING, "waits for its node"),
        (pod(waiting("ErrImagePull", "no such image")), Reason.IMAGE_PULL_FAILED, "no such image"),
        (
            pod(waiting("ImagePullBackOff", 'Back-off pulling image "x": ErrImagePull: no such image')),
            Reason.IMAGE_PULL_FAILED,
            "no such image",
        ),
        (pod(waiting("InvalidImageName")), Reason.IMAGE_PULL_FAILED, "InvalidImageName"),
        (
            pod(waiting("CreateContainerConfigError", 'secret "hf" not found')),
            Reason.MISSING_SECRET,
            'secret "hf"',
        ),
        (
            pod(waiting("CreateContainerConfigError", "couldn't find key token in Secret ns/hf")),
            Reason.MISSING_SECRET,
            "key token",
        ),
        (pod(waiting("RunContainerError", "no vllm in PATH")), Reason.ENGINE_ERROR, "no vllm in PATH"),
        (pod(LOADING), Reason.LOADING, "loads the model since 11:59:30 UTC"),
        (
            pod(
                container(
                    restarts=3, waiting={"reason": "CrashLoopBackOff"}, last=dead("ValueError: bad parser")
                )
            ),
            Reason.CRASH_LOOPING,
            "exit code 1: ValueError: bad parser",
        ),
        (
            pod(container(restarts=1, running={}, last=dead("KeyError: 'x'"))),
            Reason.ENGINE_ERROR,
            "KeyError: 'x'",
        ),
        (
            pod(container(restarts=2, running={}, last=dead("KeyError: 'x'"))),
            Reason.CRASH_LOOPING,
            "KeyError: 'x'",
        ),
        (pod(container(terminated=dead("boom", code=2))), Reason.ENGINE_ERROR, "exit code 2: boom"),
        (
            pod(container(terminated=dead("", 137, "OOMKilled"))),
            Reason.OUT_OF_MEMORY,
            "resources.limits.memory",
        ),
        (pod(container(terminated=dead(CUDA_OOM))), Reason.OUT_OF_MEMORY, "CUDA out of memory"),
        (
            pod(container(terminated=dead(TRACEBACK))),
            Reason.OUT_OF_MEMORY,
            "No available memory for the cache",
        ),
        (
            pod(phase="Failed", reason="Evicted", message="disk pressure"),
            Reason.ENGINE_ERROR,
            "Evicted: disk pressure",
        ),
        (pod(LOADING, initContainerStatuses=[container(terminated=dead("", 0))]), Reason.LOADING, "loads"),
    ],
)
def test_why_a_pod_is_not_ready(found: Json, reason: Reason, words: str) -> None:
    status = status_of(found)
    ready = status.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", reason.value)
    assert words in ready.message


def test_serving() -> None:
    status = status_of(serving(), serving(), spec={"replicas": 2}, image="i", granted=("m",))
    assert told(status) == {"Accepted": ("True", "Accepted"), "Ready": ("True", "Serving")}
    assert (status.replicas, status.ready_replicas, status.gpus) == (2, 2, 2)
    assert status.endpoint == "http://m-engine.ns.svc:8000"
    assert status.selector == "vllm-fleet.dev/model=m,app.kubernetes.io/component=engine"
    assert (status.served_names, status.image, status.image_default_for) == (("m",), "i", "cuda")


def test_observed_generation_is_in_the_first_write() -> None:
    body = model_body()
    body["metadata"]["generation"] = 7
    status = observe(parse(body), Snapshot(), NOW)
    assert status.observed_generation == 7
    assert {condition.observed_generation for condition in status.conditions} == {7}
    assert told(status)["Reconciling"] == ("True", "Starting")


def test_a_drained_pod_does_not_count_and_is_not_asked() -> None:
    status = status_of(serving(), pod(LOADING, terminating=True))
    assert told(status)["Ready"] == ("True", "Serving")
    assert status.replicas == 1
    assert told(status_of(pod(LOADING, terminating=True)))["Ready"] == ("False", "Draining")


def test_scaled_to_zero() -> None:
    assert told(status_of(spec={"replicas": 0})) == {
        "Accepted": ("True", "Accepted"),
        "Ready": ("True", "ScaledToZero"),
    }
    ending = status_of(pod(terminating=True), spec={"replicas": 0})
    assert told(ending)["Reconciling"] == ("True", "Draining")


def test_a_rollout_whose_old_revision_serves_is_ready_and_tells_the_new_ones_trouble() -> None:
    status = status_of(serving("old"), pod(waiting("ErrImagePull", "no such image")))
    assert told(status)["Ready"] == ("True", "RollingOut")
    assert told(status)["Reconciling"] == ("True", "ImagePullFailed")
    assert "0 of 1 replicas serve the current spec; 1 serve in all" in getattr(
        status.condition("Ready"), "message", ""
    )


def test_a_rollout_in_place_says_why() -> None:
    why = "no node has room for one more pod; gpu-1 lacks free cpu"
    beside = status_of(serving("old"), pod(LOADING), rollout=why).condition("Ready")
    assert beside is not None
    assert beside.message.endswith(f"; in place, since {why}")
    alone = status_of(pod(terminating=True, template="old"), rollout=why).condition("Ready")
    assert alone is not None
    assert alone.message == f"1 pods end before others begin; in place, since {why}"


def test_old_pods_that_do_not_serve_tell_nothing_of_the_current_spec() -> None:
    old = pod(waiting("ErrImagePull"), template="old")
    assert told(status_of(old))["Ready"] == ("False", "Starting")


def test_the_worst_of_several_pods_is_told() -> None:
    status = status_of(pod(LOADING), pod(container(terminated=dead("boom"))), spec={"replicas": 2})
    assert told(status)["Ready"] == ("False", "EngineError")


def test_a_quota_that_refuses_pods_is_told_by_the_deployment() -> None:
    message = 'pods "m-engine-7c9-x2z" is forbidden: exceeded quota: gpus'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    status = status_of(deployment={"status": {"conditions": [failure]}})
    assert told(status)["Stalled"] == ("True", "QuotaExceeded")
    assert getattr(status.condition("Stalled"), "message", "") == (
        "the pods are refused: exceeded quota: gpus; "
        "ask for less (gpu.count, resources, replicas), or have the ResourceQuota raised"
    )


@pytest.mark.parametrize("age", [10, 599, 600, 5000])
def test_trouble_is_stalled_once_the_start_budget_is_spent(age: float) -> None:
    trouble = pod(container(restarts=3, waiting={"reason": "CrashLoopBackOff"}, last=dead("boom")), age=age)
    kind = "Stalled" if age >= 600 else "Reconciling"
    status = status_of(trouble, spec={"startTimeout": "10m"})
    assert told(status)[kind] == ("True", "CrashLooping")
    assert len(status.conditions) == 3
    wait = seconds_until_stalled(
        model(startTimeout="10m"), Snapshot(pods=(trouble,), template_hash=HASH), NOW
    )
    assert wait == (None if age >= 600 else pytest.approx(600 - age))


@pytest.mark.parametrize("message", ["0/1 nodes are available: 1 Insufficient nvidia.com/gpu."])
def test_waiting_for_a_gpu_is_never_stalled(message: str) -> None:
    found = unschedulable(message)
    found["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    status = status_of(found, fit="gpu-1 has most free: 0.")
    assert told(status)["Reconciling"] == ("True", "InsufficientGPU")
    assert getattr(status.condition("Ready"), "message", "") == f"{message} gpu-1 has most free: 0."


def test_a_refusal_while_nothing_serves() -> None:
    status = status_of(refusal=Refusal(Reason.CHILD_CONFLICT, "a Service named m-engine exists"))
    assert told(status) == {
        "Accepted": ("False", "ChildConflict"),
        "Ready": ("False", "ChildConflict"),
        "Stalled": ("True", "ChildConflict"),
    }


def test_a_passing_refusal_is_not_stalled() -> None:
    status = status_of(refusal=Refusal(Reason.API_ERROR, "the operator lacks a right", lasting=False))
    assert told(status)["Reconciling"] == ("True", "APIError")


def test_an_invalid_edit_of_a_serving_model_leaves_it_ready_and_says_so() -> None:
    meta = model().metadata
    before = status_of(serving(), granted=("m",), image="i")
    refusal = Refusal(Reason.INVALID_SPEC, "spec.gpu.count: must be 2")
    status = observe_refused(meta, before, Snapshot(pods=(serving(),), granted=("m",)), refusal, NOW)
    assert told(status) == {
        "Accepted": ("False", "InvalidSpec"),
        "Ready": ("True", "InvalidSpec"),
        "Stalled": ("True", "InvalidSpec"),
    }
    assert (
        getattr(status.condition("Ready"), "message", "")
        == "what ran before serves on; spec.gpu.count: must be 2"
    )
    assert (status.served_names, status.image) == (("m",), "i")


def test_a_name_conflict_does_not_hide_that_the_model_serves() -> None:
    conflict = Refusal(Reason.NAME_CONFLICT, "m is held by the older model a/m")
    status = status_of(serving(), refusal=conflict)
    assert told(status) == {
        "Accepted": ("False", "NameConflict"),
        "Ready": ("True", "Serving"),
        "Stalled": ("True", "NameConflict"),
    }
    assert told(status_of(pod(LOADING), refusal=conflict))["Reconciling"] == ("True", "Loading")


def test_paused_and_autoscaled_models_say_so_in_accepted() -> None:
    body = model_body()
    body["metadata"]["annotations"] = {"vllm-fleet.dev/paused": "true"}
    assert told(observe(parse(body), Snapshot(), NOW))["Accepted"] == ("True", "Paused")
    held = status_of(spec={"autoscaling": {"minReplicas": 0, "maxReplicas": 3}}).condition("Accepted")
    assert "held at 1 replicas" in getattr(held, "message", "")


def test_the_time_of_a_transition_stays_while_the_status_stays() -> None:
    first = status_of(pod(LOADING))
    later = NOW + datetime.timedelta(minutes=5)
    again = observe(
        model().model_copy(update={"status": first}),
        Snapshot(pods=(pod(LOADING),), template_hash=HASH),
        later,
    )
    assert again == first.model_copy(update={"image_default_for": "cuda"})
    up = observe(
        model().model_copy(update={"status": first}), Snapshot(pods=(serving(),), template_hash=HASH), later
    )
    assert getattr(up.condition("Ready"), "last_transition_time", "") == "2026-01-01T12:05:00Z"
    assert getattr(up.condition("Accepted"), "last_transition_time", "") == "2026-01-01T12:00:00Z"


def test_every_reason_is_described() -> None:
    assert set(DESCRIPTIONS) == set(Reason)


pods = st.lists(
    st.sampled_from(
        [
            serving(),
            serving("old"),
            pod(LOADING),
            pod(waiting("ErrImagePull"), age=9999),
            pod(container(terminated=dead("x"))),
            unschedulable("Insufficient nvidia.com/gpu"),
            pod(LOADING, terminating=True),
            pod(phase="Failed"),
        ]
    ),
    max_size=5,
)


@given(pods, st.integers(0, 3), st.sampled_from([None, *Reason]))
def test_kstatus_holds_whatever_the_pods(found: list[Json], replicas: int, reason: Reason | None) -> None:
    refusal = Refusal(reason, "why") if reason else None
    status = status_of(*found, spec={"replicas": replicas}, refusal=refusal)
    conditions = told(status)
    assert set(conditions) >= {"Accepted", "Ready"}
    assert not {"Reconciling", "Stalled"} <= set(conditions)
    assert all(conditions[kind][0] == "True" for kind in ("Reconciling", "Stalled") if kind in conditions)
    if conditions["Ready"][0] == "False":
        assert "Reconciling" in conditions or "Stalled" in conditions
    assert all(reason in set(Reason) for _, reason in conditions.values())


# The engine's last words

PYDANTIC_FIELD = """pydantic_core._pydantic_core.ValidationError: 2 validation errors for ModelConfig
dtype
  Input should be 'auto' [type=literal_error, input_value='x', input_type=str]
"""
PYDANTIC = """  File "/opt/venv/lib/python3.11/site-packages/vllm/engine/arg_utils.py", line 1955, in create
    return ModelConfig(
           ^^^^^^^^^^^^
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (100000) is greater than the derived max_model_len \
[type=value_error, input_value=ArgsKwargs((), {'model': ...nderer_num_workers': 1}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error

"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (TRACEBACK, "ValueError: No available memory for the cache."),
        ("vllm: error: unrecognized arguments: --no-such", "vllm: error: unrecognized arguments: --no-such"),
        (PYDANTIC, "Value error, max_model_len (100000) is greater than the derived max_model_len"),
        ("ValidationError: 1 validation error for M", "ValidationError: 1 validation error for M"),
        ("\x1b[31mloading\x1b[0m\nbye\n\n", "bye"),
        ("", ""),
    ],
)
def test_the_last_line_is_the_one_that_tells(message: str, line: str) -> None:
    assert last_error_line(message) == line


@pytest.mark.parametrize(
    "secret",
    [
        "401 for token hf_AbCdEfGhIjKl",
        "Authorization: Bearer eyJhbGciOi.xyz",
        "HF_TOKEN=hf_123456789 vllm",
        "--api-key=topsecret",
        "--hf-token topsecret --port 1",
        '["--hf-token", "topsecret"]',
        "password: 'topsecret'",
        "https://user:topsecret@registry.example/v2",
        "AKIAABCDEFGHIJKLMNOP is not allowed",
    ],
)
def test_credentials_are_taken_out(secret: str) -> None:
    cleaned = scrub(secret)
    assert "[redacted]" in cleaned
    for part in ("AbCdEf", "eyJ", "123456789", "topsecret", "ABCDEFGH"):
        assert part not in cleaned


def test_a_long_line_is_clipped() -> None:
    assert len(last_error_line(f"ValueError: {'x' * 5000}")) == MAX_LINE
