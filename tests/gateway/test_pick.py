"""Which endpoint, which model.

Proves, for any endpoints and loads:
- least load never chooses an endpoint with more requests than another, and spreads ties;
- prefix hash gives the same answer in every process and for every order of the endpoints, never goes above
  its bound, and moves only the keys of an endpoint that leaves;
- a session stays where it is while its endpoint is there;
- weights split callers in proportion, each caller always to the same model, and raising one model's weight
  moves callers to it only; a weight of 0 gets nobody, and a model without endpoints is passed over.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.routing.pick import LOAD_FACTOR, Hint, PrefixHash, Strategy, by_weight, least_load, session
from vllm_gateway.routing.table import Endpoint, Model

NAMES = st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, max_size=12, unique=True)
LOADS = st.dictionaries(st.text("abcdef0123456789", min_size=1, max_size=8), st.integers(1, 50))
DRAW = st.floats(0, 1, exclude_max=True)


def endpoints(names: list[str]) -> list[Endpoint]:
    return [Endpoint(name, "10.0.0.1", 8000) for name in names]


def model(name: str, weight: int = 100, *, ready: bool = True) -> Model:
    return Model(name, name, "ns", ("chat",), tuple(endpoints([name])) if ready else (), weight=weight)


@given(NAMES, LOADS, DRAW)
def test_least_load_is_least(names: list[str], loads: dict[str, int], draw: float) -> None:
    chosen = least_load(endpoints(names), loads, Hint(draw))
    assert loads.get(chosen.id, 0) == min(loads.get(name, 0) for name in names)


def test_least_load_spreads_ties() -> None:
    fleet = endpoints(["a", "b", "c", "d"])
    chosen = Counter(least_load(fleet, {"a": 1}, Hint(draw / 300)).id for draw in range(300))
    assert chosen == {"b": 100, "c": 100, "d": 100}


@given(NAMES.map(lambda names: names[:5]), LOADS, st.text(min_size=1), st.randoms(use_true_random=False))
def test_prefix_hash_ignores_the_order(
    names: list[str], loads: dict[str, int], text: str, random: Random
) -> None:
    shuffled = random.sample(names, len(names))
    chosen = [PrefixHash()(endpoints(order), loads, Hint(prefix=text)) for order in (names, shuffled)]
    assert chosen[0] == chosen[1] or len(names) == 1


@given(NAMES, LOADS, st.text(min_size=1))
def test_prefix_hash_is_bounded(names: list[str], loads: dict[str, int], text: str) -> None:
    chosen = PrefixHash()(endpoints(names), loads, Hint(prefix=text))
    total = sum(loads.get(name, 0) for name in names) + 1
    assert loads.get(chosen.id, 0) + 1 <= math.ceil(LOAD_FACTOR * total / len(names)) or len(names) == 1


def test_prefix_hash_is_the_same_in_another_process() -> None:
    code = (
        "from vllm_gateway.routing.pick import Hint, PrefixHash\n"
        "from vllm_gateway.routing.table import Endpoint\n"
        "fleet = [Endpoint(name, '10.0.0.1', 8000) for name in 'abcdef']\n"
        "print(*[PrefixHash()(fleet, {}, Hint(prefix=f'prompt {n}')).id for n in range(50)])"
    )
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(set(runs[0].stdout.split())) > 3


def test_prefix_hash_moves_only_the_keys_of_the_endpoint_that_left() -> None:
    pick = PrefixHash()
    fleet = endpoints(list("abcdef"))
    keys = [f"You are a helpful assistant number {number}" for number in range(600)]
    before = {key: pick(fleet, {}, Hint(prefix=key)).id for key in keys}
    after = {key: pick(fleet[:-1], {}, Hint(prefix=key)).id for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "f")
    shares = Counter(before.values())
    assert min(shares.values()) > 60, shares  # a fair share is 100


def test_prefix_hash_spills_a_hot_prefix() -> None:
    pick = PrefixHash()
    fleet = endpoints(list("abcd"))
    loads: Counter[str] = Counter()
    for _ in range(100):
        loads[pick(fleet, loads, Hint(prefix="the same for all")).id] += 1
    assert max(loads.values()) <= math.ceil(LOAD_FACTOR * 100 / 4)
    assert len(loads) == 4


def test_prefix_hash_keeps_a_bounded_number_of_rings() -> None:
    pick = PrefixHash()
    for number in range(300):
        pick(endpoints([f"a{number}", f"b{number}"]), {}, Hint(prefix="x"))
    assert len(pick._rings) == 128


@given(NAMES, st.text(min_size=1))
def test_session_stays_when_others_leave(names: list[str], text: str) -> None:
    fleet = endpoints(names)
    chosen = session(fleet, {}, Hint(session=text))
    for other in fleet:
        left = [endpoint for endpoint in fleet if endpoint in (chosen, other)]
        assert session(left, {chosen.id: 99}, Hint(session=text)) == chosen


@pytest.mark.parametrize("strategy", [session, PrefixHash()])
def test_without_a_key_the_least_loaded_is_chosen(strategy: Strategy) -> None:
    assert strategy(endpoints(["a", "b"]), {"a": 3}, Hint()).id == "b"


def test_weights_split_callers_in_proportion_and_stick() -> None:
    stable, canary = model("stable", 90), model("canary", 10)
    callers = [f"caller-{number}" for number in range(2000)]
    chosen = {caller: by_weight([stable, canary], Hint(caller=caller)) for caller in callers}
    assert 140 < sum(found == canary for found in chosen.values()) < 260
    again = {caller: by_weight([canary, stable], Hint(0.99, caller=caller)) for caller in callers}
    assert again == chosen


def test_a_larger_weight_takes_callers_and_gives_none_away() -> None:
    stable = model("stable", 90)
    hints = [Hint(session=f"session-{number}") for number in range(500)]
    before = [by_weight([stable, model("canary", 10)], hint) for hint in hints]
    after = [by_weight([stable, model("canary", 40)], hint) for hint in hints]
    moved = [(a.name, b.name) for a, b in zip(before, after, strict=True) if a and b and a.name != b.name]
    assert set(moved) == {("stable", "canary")}


def test_anonymous_callers_are_split_by_the_draw() -> None:
    models = [model("stable", 75), model("canary", 25)]
    chosen = Counter(found.name for n in range(100) if (found := by_weight(models, Hint(n / 100))))
    assert chosen == {"stable": 75, "canary": 25}


def test_a_weight_of_zero_gets_nobody_and_no_endpoint_is_passed_over() -> None:
    off, on = model("off", 0), model("on", 100)
    assert all(by_weight([off, on], Hint(caller=str(number))) == on for number in range(50))
    down = model("down", ready=False)
    assert by_weight([down, off], Hint(caller="x")) == off
    assert by_weight([down], Hint(caller="x")) is None
