"""`spec.gateway`, as the operator admits it, is what the gateway does.

Proves: a VLLMModel with every field of `spec.gateway` that the operator knows is read by the gateway field by
field; what is left out is left to the gateway's settings; the names of routings are the same on both sides;
the conditions that the operator writes are those that the gateway shows, and a stalled one is not waited for.
"""

from __future__ import annotations

from typing import Any, get_args

from vllm_gateway.discovery.objects import STARTING, models_of
from vllm_gateway.routing.pick import strategies
from vllm_gateway.routing.table import Limits, Model
from vllm_gateway.settings import Routing
from vllm_operator.api.parsing import parse
from vllm_operator.api.serving import Gateway
from vllm_operator.api.status import Condition, Reason

FULL = {
    "routing": "PrefixHash",
    "weight": 10,
    "firstTokenTimeout": "5m",
    "idleTimeout": "45s",
    "maxInFlight": 256,
    "maxQueue": 0,
    "queueTimeout": "0s",
    "responseCache": {"ttl": "5m"},
}


def seen(gateway: dict[str, Any] | None = None, autoscaling: Any = None, *conditions: Condition) -> Model:
    """The model as the gateway sees it, once the operator has found nothing wrong with it."""
    spec: dict[str, Any] = {"model": "org/name"}
    spec |= {"gateway": gateway} if gateway is not None else {}
    spec |= {"autoscaling": autoscaling} if autoscaling is not None else {}
    body: dict[str, Any] = {
        "apiVersion": "vllm-fleet.dev/v1alpha1",
        "kind": "VLLMModel",
        "metadata": {"name": "m", "namespace": "ns", "uid": "u-1"},
        "spec": spec,
    }
    parse(body)
    shown = [item.model_dump(by_alias=True) for item in conditions]
    (model,) = models_of([body | {"status": {"servedNames": ["m"], "conditions": shown}}], [])
    return model


def condition(kind: Any, status: Any, reason: Reason) -> Condition:
    return Condition(
        type=kind, status=status, reason=reason, message="why", last_transition_time="2026-01-01T00:00:00Z"
    )


def test_every_field_is_read() -> None:
    assert {field.alias or name for name, field in Gateway.model_fields.items()} == set(FULL)
    model = seen(FULL)
    assert (model.routing, model.weight) == ("PrefixHash", 10)
    assert model.limits == Limits(
        first_token=300,
        idle=45,
        max_in_flight=256,
        max_queue=0,
        queue_timeout=0,
        cold_start=None,
        cache_ttl=300,
    )


def test_what_is_left_out_is_left_to_the_settings() -> None:
    model = seen()
    assert (model.routing, model.weight, model.limits) == (None, 100, Limits())


def test_only_a_model_that_scales_is_waited_for() -> None:
    assert seen(None, {"maxReplicas": 2}).limits.cold_start == 600
    assert seen(None, {"maxReplicas": 2, "coldStartTimeout": "3m"}).limits.cold_start == 180


def test_a_model_that_is_about_to_serve_is_waited_for_too() -> None:
    assert {*Reason, "Downloading"} >= STARTING
    for reason in Reason:
        made = seen(None, None, condition("Ready", "False", reason))
        assert made.starting == (reason in STARTING)
    assert not seen().starting


def test_routings_have_the_same_names() -> None:
    admitted, _ = get_args(Gateway.model_fields["routing"].annotation)  # the other one is None
    assert set(get_args(admitted)) == set(get_args(Routing))
    assert set(strategies()) == set(get_args(Routing))


def test_conditions() -> None:
    waiting = seen(None, None, condition("Ready", "False", Reason.LOADING))
    assert (waiting.reason, waiting.message, waiting.stalled) == (Reason.LOADING, "why", False)
    ready = condition("Ready", "False", Reason.INVALID_SPEC)
    stalled = seen(None, None, ready, condition("Stalled", "True", Reason.INVALID_SPEC))
    assert (stalled.reason, stalled.stalled) == (Reason.INVALID_SPEC, True)
