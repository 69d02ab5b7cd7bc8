"""The table, the counts and the choices: pure.

Proves: a full name always wins; a short name belongs to one namespace; unknown and not-ready are told
apart; a count comes back however a request ends, and nothing is kept of a model that is gone; a model is idle
since its last request, or since it is known; the least loaded is chosen, ties evenly; weights hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.errors import GatewayError
from vllm_gateway.routing.load import Load
from vllm_gateway.routing.pick import Hint, by_weight, least_load
from vllm_gateway.routing.table import Endpoint, Model, Table, not_ready

DRAWS = st.floats(min_value=0, max_value=1, exclude_max=True)


def model(
    name: str, *, namespace: str = "ns", served: tuple[str, ...] = (), pods: int = 1, **more: int
) -> Model:
    endpoints = tuple(Endpoint(f"{namespace}-{name}-{pod}", "10.0.0.1", 8000) for pod in range(pods))
    return Model(name, name, namespace, served, endpoints, **more)  # type: ignore[arg-type]


def test_models_are_found_by_key_and_by_granted_name_only() -> None:
    table = Table.of([model("a", served=("x",)), model("b")])
    assert table.resolve("ns/a") == table.resolve("x")
    assert table.resolve("ns/b")[0].name == "b"
    with pytest.raises(GatewayError) as caught:
        table.resolve("b")
    assert caught.value.status == 404
    assert caught.value.message.endswith("Models served here: ns/b, x.")


def test_a_key_wins_over_a_short_name_that_looks_like_it() -> None:
    table = Table.of([model("a"), model("thief", namespace="other", served=("ns/a",))])
    assert [found.key for found in table.resolve("ns/a")] == ["ns/a"]


def test_a_short_name_is_shared_within_a_namespace_and_never_between_two() -> None:
    models = [
        model("late", namespace="a", served=("x",), created=9),
        model("one", namespace="b", served=("x",), created=1),
        model("two", namespace="b", served=("x",), created=5),
    ]
    for order in (models, models[::-1]):
        assert [found.key for found in Table.of(order).resolve("x")] == ["b/one", "b/two"]


def test_an_unknown_name_is_no_404_before_everything_has_been_seen() -> None:
    for table, words in (
        (Table(), "not seen"),
        (Table.of([], complete=False, notes=["API down"]), "API down"),
    ):
        with pytest.raises(GatewayError, match=words) as caught:
            table.resolve("x")
        assert (caught.value.status, caught.value.retry_after) == (503, 2)


def test_a_long_list_of_names_is_shortened() -> None:
    table = Table.of([model(f"m{number:03}", served=(f"s{number:03}",)) for number in range(100)])
    with pytest.raises(GatewayError) as caught:
        table.resolve("x")
    assert caught.value.message.endswith("s018, s019, ….")


def test_not_ready_takes_the_words_of_the_condition() -> None:
    error = not_ready("x", [Model("a", "a"), Model("b", "b", reason="Loading", message="40 %")])
    assert error.message == "The model 'x' is not ready: Loading: 40 %"
    assert (error.status, error.retry_after) == (503, 5)


def test_what_is_given_back_is_counted_no_longer() -> None:
    now = 100.0
    load = Load(lambda: now)
    load.follow({"ns/a": model("a")})
    load.take("ns/a", "ns-a-0")
    load.take("ns/a", "ns-a-1")
    assert load.snapshot() == ({"ns/a": 2}, {"ns-a-0": 1, "ns-a-1": 1})
    load.give_back("ns/a", "ns-a-1")
    assert load.snapshot() == ({"ns/a": 1}, {"ns-a-0": 1})
    assert load.idle_seconds("ns/a") == 0.0
    load.give_back("ns/a", "ns-a-0")
    assert load.snapshot() == ({}, {})
    now = 130.0
    assert load.idle_seconds("ns/a") == 30.0


def test_a_model_is_idle_since_its_last_request_or_since_it_is_known() -> None:
    """A gateway that is days old must not say of a model made a minute ago that it has been idle for days."""
    now = 1000.0
    load = Load(lambda: now)
    old = model("old")
    load.follow({"ns/old": old})
    now += 500
    load.take("ns/old", "ns-old-0")
    load.give_back("ns/old", "ns-old-0")
    now += 40
    new = replace(model("new"), created=7)
    load.follow({"ns/old": old, "ns/new": new})
    now += 2
    assert (load.idle_seconds("ns/old"), load.idle_seconds("ns/new")) == (42, 2)
    load.follow({"ns/old": replace(old, weight=3), "ns/new": new})  # an edit is no new model
    assert load.idle_seconds("ns/new") == 2
    load.follow({"ns/old": replace(old, created=9), "ns/new": new})  # deleted and made again
    assert load.idle_seconds("ns/old") == 0
    now += 5
    assert load.idle_seconds("ns/old") == 5
    assert load.idle_seconds("ns/unknown") == 0


def test_nothing_is_kept_of_models_that_are_gone() -> None:
    load = Load(lambda: 0.0)
    for number in range(1000):
        found = model(f"m{number}")
        load.follow({found.key: found})
        load.take(found.key, "e")
        load.follow({})  # while a request is under way
        load.give_back(found.key, "e")
    load.follow({})
    assert not load._last_busy
    assert not load._known
    assert load.snapshot() == ({}, {})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), DRAWS)
def test_the_least_loaded_is_chosen(loads: list[int], draw: float) -> None:
    endpoints = model("a", pods=len(loads)).endpoints
    in_flight = {endpoint.id: count for endpoint, count in zip(endpoints, loads, strict=True)}
    assert in_flight[least_load(endpoints, in_flight, Hint(draw)).id] == min(loads)


def test_ties_are_spread_evenly() -> None:
    endpoints = model("a", pods=4).endpoints
    chosen = Counter(least_load(endpoints, {}, Hint(step / 100)).id for step in range(100))
    assert set(chosen.values()) == {25}


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2)), max_size=6), DRAWS)
def test_a_model_with_an_endpoint_is_found_if_there_is_one(shape: list[tuple[int, int]], draw: float) -> None:
    models = [model(f"m{at}", pods=pods, weight=weight) for at, (weight, pods) in enumerate(shape)]
    chosen = by_weight(models, Hint(draw))
    assert (chosen is None) == (not any(pods for _, pods in shape))
    assert chosen is None or chosen.endpoints


def test_models_that_share_a_name_are_chosen_by_weight() -> None:
    models = [model("stable", weight=90), model("canary", weight=10), model("down", weight=500, pods=0)]
    chosen = Counter(found.name for step in range(100) if (found := by_weight(models, Hint(step / 100))))
    assert chosen == {"stable": 90, "canary": 10}
