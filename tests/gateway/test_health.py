"""Endpoints that fail are left alone for a while.

Proves:
- an endpoint is ejected after so many failures in a row, not by failures with successes in between;
- ejections last twice as long each time, up to a limit, and are short again after a long good time;
- after an ejection exactly one request is let through; its success ends the ejection, its failure doubles
  it, and an end that says nothing lets the next request try;
- the first token of that one lets others through before its end; until a whole answer one failure is enough
  for the next ejection, which is twice as long; first tokens of other requests change nothing;
- for any history, never more than the maximum share is ejected, one endpoint alone never, and the first that
  were ejected are those that stay so;
- a request that was under way when the endpoint was ejected does not prolong it;
- endpoints that left are forgotten.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.routing.health import Ejection, Health
from vllm_gateway.routing.table import Endpoint

A, B, C, D = (Endpoint(name, "10.0.0.1", 8000) for name in "abcd")
FLEET = (A, B, C, D)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(**ejection: float) -> tuple[Health, Clock]:
    clock = Clock()
    return Health(clock, Ejection(**ejection)), clock  # type: ignore[arg-type]


def fail(health: Health, endpoint: Endpoint, times: int = 3) -> None:
    for _ in range(times):
        health.failed(endpoint.id)


def test_only_failures_in_a_row_eject() -> None:
    health, _ = make()
    for _ in range(10):
        fail(health, A, 2)
        health.succeeded(A.id)
    assert list(health.usable(FLEET)) == list(FLEET)
    fail(health, A, 3)
    assert health.usable(FLEET) == [B, C, D]


def test_ejections_double_up_to_a_limit() -> None:
    health, clock = make(base=10, longest=35)
    fail(health, A)
    for seconds in (10, 20, 35, 35):
        clock.now += seconds - 0.5
        assert health.ejected(FLEET) == {"a"}
        clock.now += 1
        assert not health.ejected(FLEET)
        health.chosen(A.id)
        health.failed(A.id)


def test_one_request_is_the_trial() -> None:
    health, clock = make()
    fail(health, A)
    clock.now += 11
    assert A in health.usable(FLEET)
    health.chosen(A.id)
    assert A not in health.usable(FLEET)
    health.succeeded(A.id)
    assert A in health.usable(FLEET)
    fail(health, A, 2)
    assert A in health.usable(FLEET)  # trusted again: it takes three


def test_the_first_token_decides_the_trial() -> None:
    health, clock = make(base=10)
    fail(health, A)
    clock.now += 11
    health.chosen(A.id)
    assert A not in health.usable(FLEET)
    health.proved(A.id)
    assert A in health.usable(FLEET)
    health.failed(A.id)  # it began and broke off, as it may do each time
    assert health.ejected(FLEET) == {"a"}
    clock.now += 19
    assert health.ejected(FLEET) == {"a"}
    clock.now += 2
    health.chosen(A.id)
    health.proved(A.id)
    health.succeeded(A.id)
    fail(health, A, 2)
    assert A in health.usable(FLEET)  # trusted again: it takes three


def test_first_tokens_of_other_requests_change_nothing() -> None:
    health, _ = make(base=10)
    fail(health, A, 2)
    health.proved(A.id)
    fail(health, A, 1)
    assert health.ejected(FLEET) == {"a"}
    health.proved(A.id)  # of one that was under way
    assert health.ejected(FLEET) == {"a"}
    health.proved(B.id)
    assert list(health._states) == ["a"]


def test_a_trial_that_says_nothing_lets_the_next_one_try() -> None:
    health, clock = make()
    fail(health, A)
    clock.now += 11
    health.chosen(A.id)
    health.ended(A.id)
    assert A in health.usable(FLEET)


def test_a_trial_that_is_never_heard_of_does_not_block_for_ever() -> None:
    health, clock = make(longest=60)
    fail(health, A)
    clock.now += 11
    health.chosen(A.id)
    clock.now += 61
    assert A in health.usable(FLEET)


def test_after_a_long_good_time_the_next_ejection_is_short() -> None:
    health, clock = make(base=10, longest=40)
    for _ in range(3):
        fail(health, A)
        clock.now += 41
        health.chosen(A.id)
        health.succeeded(A.id)
    clock.now += 41
    health.succeeded(A.id)
    fail(health, A)
    clock.now += 10.5
    assert not health.ejected(FLEET)


def test_one_endpoint_alone_is_never_ejected() -> None:
    health, _ = make()
    fail(health, A, 20)
    assert list(health.usable([A])) == [A]


def test_the_first_that_were_ejected_stay_so() -> None:
    health, clock = make(base=60)
    for endpoint in FLEET:
        fail(health, endpoint)
        clock.now += 1
    assert health.ejected(FLEET) == {"a", "b"}


def test_requests_under_way_do_not_prolong_an_ejection() -> None:
    health, clock = make(base=10)
    fail(health, A)
    clock.now += 9
    fail(health, A, 5)
    clock.now += 2
    assert not health.ejected(FLEET)


def test_endpoints_that_left_are_forgotten() -> None:
    health, _ = make()
    for number in range(1000):
        health.failed(str(number))
    health.keep({"7"})
    assert list(health._states) == ["7"]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["failed", "succeeded", "chosen", "proved", "ended", "wait"]), st.integers(0, 3)
    ),
    max_size=80,
)


@given(STEPS, st.floats(0, 1))
def test_never_more_than_the_maximum_share(steps: list[tuple[str, int]], share: float) -> None:
    health, clock = make(failures=1, max_share=share)
    for action, index in steps:
        if action == "wait":
            clock.now += 7 * (index + 1)
        else:
            getattr(health, action)(FLEET[index].id)
        for size in range(1, 5):
            usable = health.usable(FLEET[:size])
            assert len(usable) >= max(1, size - int(size * share))
            assert set(usable) <= set(FLEET[:size])
