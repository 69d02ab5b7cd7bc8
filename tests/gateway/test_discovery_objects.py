"""From objects of the API to models of the table.

Proves: which slices and which of their endpoints count; a model's keys and revision are its own; one that the
operator has not seen says so; what has not changed is not built again.
"""

from __future__ import annotations

from typing import Any

import pytest
from kube_objects import endpoint, model, slice_of

from vllm_gateway.discovery.objects import Models, models_of
from vllm_gateway.routing.table import Model

BODY = model() | {"metadata": {"namespace": "ns", "name": "m", "uid": "u1"}}


def stolen(**changes: Any) -> dict[str, Any]:
    made = slice_of(BODY, endpoint())
    made["metadata"]["namespace"] = "ns"
    for key, value in changes.items():
        made["metadata"][key] = value
    return made


def labelled(**labels: str) -> dict[str, Any]:
    made = stolen()
    made["metadata"]["labels"] |= {
        key.replace("__", "/").replace("_", "-"): value for key, value in labels.items()
    }
    return made


NOT_OURS = {
    "another namespace": stolen(namespace="other"),
    "no owner": stolen(ownerReferences=[]),
    "owned by a Deployment": stolen(ownerReferences=[{"kind": "Deployment", "controller": True}]),
    "owner that does not control": stolen(ownerReferences=[{"kind": "Service", "controller": False}]),
    "another model's uid": labelled(**{"vllm-fleet.dev__model_uid": "u2"}),
    "made by hand": labelled(**{"endpointslice.kubernetes.io__managed_by": "me"}),
    "another service": labelled(**{"kubernetes.io__service_name": "x-engine"}),
}


@pytest.mark.parametrize("made", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_a_slice_that_is_not_the_models_own_is_ignored(made: dict[str, Any]) -> None:
    assert models_of([BODY], [stolen()])[0].endpoints
    assert not models_of([BODY], [made])[0].endpoints


def test_the_keys_are_those_of_the_very_model() -> None:
    asked: list[tuple[str, str, str]] = []

    def keys_of(*model: str) -> tuple[str, str]:
        asked.append((model[0], model[1], model[2]))
        return "new", "old"

    (end,) = models_of([BODY], [stolen()], keys_of)[0].endpoints
    assert (end.key, end.former_key) == ("new", "old")
    assert asked == [("ns", "m", "u1")]


@pytest.mark.parametrize(
    ("entry", "counts"),
    [
        (endpoint(), True),
        (endpoint() | {"conditions": {}}, True),
        (endpoint() | {"conditions": None}, True),
        (endpoint(ready=False), False),
        (endpoint(terminating=True), False),
        (endpoint(ready=False, serving=True, terminating=True), False),
        (endpoint() | {"targetRef": {"kind": "Node", "uid": "n"}}, False),
        (endpoint() | {"targetRef": None}, False),
        (endpoint() | {"addresses": []}, False),
    ],
)
def test_which_endpoints_count(entry: dict[str, Any], counts: bool) -> None:
    made = slice_of(BODY, entry)
    made["metadata"]["namespace"] = "ns"
    assert bool(models_of([BODY], [made])[0].endpoints) is counts


def test_a_pod_in_two_slices_is_one_endpoint() -> None:
    assert len(models_of([BODY], [stolen(name="a"), stolen(name="b")])[0].endpoints) == 1


def test_a_slice_without_the_named_port_has_no_endpoints() -> None:
    made = stolen()
    made["ports"] = [{"name": "metrics", "port": 8000}]
    assert not models_of([BODY], [made])[0].endpoints


def test_the_revision_is_that_of_the_pods_that_last_served() -> None:
    served = BODY | {"status": {"lastServed": {"generation": 3, "template": "abc", "spec": "def"}}}
    assert [found.revision for found in models_of([BODY, served], [])] == ["", "abc"]


def test_a_model_that_the_operator_has_not_seen_says_so() -> None:
    bare = {"metadata": {"namespace": "ns", "name": "m", "uid": "u"}, "spec": {"gateway": {"weight": "x"}}}
    found = models_of([bare], [])[0]
    assert (found.reason, found.served_names, found.weight) == ("Pending", (), 100)


def test_only_what_changed_is_built_again() -> None:
    other = {**BODY, "metadata": {**BODY["metadata"], "name": "other"}}
    keys = {"m": "k1", "other": "k1"}
    models, slices = Models(), [stolen()]

    def built() -> list[Model]:
        return models.of([BODY, other], slices, lambda _namespace, name, _uid: (keys.get(name), None))

    first = built()
    assert all(one is same for one, same in zip(first, built(), strict=True))
    keys["other"] = "k2"
    assert [one is same for one, same in zip(first, built(), strict=True)] == [True, False]
    slices[0] = {**stolen(), "endpoints": []}
    emptied = built()
    assert first[0].endpoints
    assert not emptied[0].endpoints
    slices.clear()
    assert built()[0] is not emptied[0]
