"""What several workers say, added up: metrics and /load (`test_workers` has the processes).

Proves: what a worker had counted stays when it dies, for as long as its model is there; what workers let go
of, each in its own time, never makes a counter go back, and goes in the end; the sum has the metrics of one
gateway; of each gauge it is decided whether it is added up; loads add up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_gateway.telemetry import KEPT_SECONDS, Metrics
from vllm_gateway.together import GREATEST, Totals, add_loads

PATH = "/v1/chat/completions"


def exposition(requests: float, in_flight: float, age: float) -> str:
    metrics = Metrics()
    metrics.requests.labels("m", PATH, "200").inc(requests)
    metrics.first_token.labels("m").observe(0.3)
    metrics.readings.in_flight = lambda: {"m": int(in_flight)}
    metrics.readings.endpoints = lambda: {"m": 3}
    metrics.readings.table_age = lambda: age
    return generate_latest(metrics.registry).decode()


def values(totals: Totals) -> dict[str, float]:
    samples = (sample for family in totals.collect() for sample in family.samples)
    return {s.name.removeprefix("vllm_gateway_") + s.labels.get("le", ""): s.value for s in samples}


def test_what_a_dead_worker_counted_stays() -> None:
    totals = Totals(2)
    totals.update([(1.0, exposition(10, 1, 5)), (1.5, exposition(20, 2, 9))])
    one = values(totals)
    assert (one["requests_total"], one["in_flight"], one["table_age_seconds"]) == (30, 3, 9)
    assert (one["endpoints"], one["time_to_first_token_seconds_count"]) == (3, 2)
    assert (one["time_to_first_token_seconds_bucket0.25"], one["time_to_first_token_seconds_bucket+Inf"]) == (
        0,
        2,
    )
    totals.update([None, (1.5, exposition(21, 2, 9))])  # the first is being started anew
    assert (values(totals)["requests_total"], values(totals)["in_flight"]) == (31, 2)
    totals.update([(7.0, exposition(2, 0, 1)), (1.5, exposition(21, 2, 9))])
    assert values(totals)["requests_total"] == 33
    totals.update([(7.0, exposition(50, 0, 1)), (1.5, exposition(21, 2, 9))])  # more than the one before
    assert values(totals)["requests_total"] == 10 + 50 + 21


def labelled(model: str, key: str, amount: float, table: Sequence[str] = ()) -> str:
    """What a worker says that has counted this, and has these models in its table."""
    metrics = Metrics()
    if amount:
        metrics.tokens.labels(model, key, "prompt").inc(amount)
        metrics.requests.labels(model, PATH, "200").inc(amount)
    metrics.requests.labels("unknown", PATH, "404").inc()
    metrics.readings.endpoints = lambda: dict.fromkeys(table, 1)
    return generate_latest(metrics.registry).decode()


def tokens(totals: Totals) -> dict[tuple[str, str], float]:
    samples = (sample for family in totals.collect() for sample in family.samples)
    return {(s.labels["model"], s.labels["key"]): s.value for s in samples if "key" in s.labels}


def test_what_workers_let_go_of_one_after_the_other_never_goes_back_and_then_goes() -> None:
    now = [0.0]
    totals = Totals(2, lambda: now[0])
    totals.update([(1.0, labelled("gone", "k", 10)), (1.5, labelled("gone", "k", 5))])
    totals.update([(1.0, labelled("gone", "k", 0)), (1.5, labelled("gone", "k", 5))])
    assert tokens(totals) == {("gone", "k"): 15}
    now[0] += KEPT_SECONDS + 1
    totals.update([(1.0, labelled("gone", "k", 0)), (1.5, labelled("gone", "k", 5))])
    assert tokens(totals) == {("gone", "k"): 15}  # one has it still
    for _ in range(2):
        totals.update([(1.0, labelled("gone", "k", 0)), (1.5, labelled("gone", "k", 0))])
        assert tokens(totals) == {("gone", "k"): 15}
        now[0] += KEPT_SECONDS - 1
    now[0] += 3
    totals.update([None, None])
    assert tokens(totals) == {}
    assert not totals._keys_let_go


def test_what_a_dead_worker_counted_goes_with_its_model_and_not_with_time() -> None:
    now = [0.0]
    totals = Totals(2, lambda: now[0])
    totals.update([(1.0, labelled("m", "k", 10)), (1.5, labelled("m", "k", 0, ["m"]))])
    for _ in range(3):  # the first was started anew
        totals.update([(7.0, labelled("m", "k", 0, ["m"])), (1.5, labelled("m", "k", 0, ["m"]))])
        assert tokens(totals) == {("m", "k"): 10}
        now[0] += KEPT_SECONDS + 1
    totals.update([(7.0, labelled("m", "k", 0)), (1.5, labelled("m", "k", 0))])
    assert tokens(totals) == {("m", "k"): 10}
    now[0] += KEPT_SECONDS + 1
    totals.update([(7.0, labelled("m", "k", 0)), (1.5, labelled("m", "k", 0))])
    assert tokens(totals) == {}
    assert values(totals)["requests_total"] == 3  # of an unknown model, also those of the dead worker


def test_the_sum_has_the_same_metrics_as_one_gateway() -> None:
    text, totals = exposition(10, 1, 5), Totals(1)
    totals.update([(1.0, text)])
    assert list(described(totals)) == list(described(text_string_to_metric_families(text)))


def described(families: Any) -> Iterator[tuple[str, str, str]]:
    with contextlib.suppress(AttributeError):
        families = families.collect()
    return ((family.name, family.type, family.documentation) for family in families)


def test_every_gauge_is_one_that_adds_up_or_one_whose_greatest_counts() -> None:
    gauges = {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    assert gauges - GREATEST == {f"vllm_gateway_{name}" for name in ("in_flight", "queued", "connections")}
    assert gauges >= GREATEST


def test_loads_add_up() -> None:
    def report(started: float, idle: float, in_flight: int, **more: Any) -> dict[str, Any]:
        model = {
            "in_flight": in_flight,
            "queued": 1,
            "oldest_queued_seconds": idle / 2,
            "idle_seconds": idle,
            "endpoints": {"a": in_flight, f"only-{started:g}": 1},
        }
        return {"started_at": started, "draining": False, "models": {"m": model}, **more}

    other = {"m": report(5, 1, 1)["models"]["m"], "n": report(5, 9, 0)["models"]["m"]}
    added = add_loads([report(3, 8.0, 2), report(5, 4.0, 3, draining=True, models=other)])
    assert (added["started_at"], added["draining"], list(added["models"])) == (5, True, ["m", "n"])
    assert added["models"]["m"] == {
        "in_flight": 3,
        "queued": 2,
        "oldest_queued_seconds": 4.0,
        "idle_seconds": 1,
        "endpoints": {"a": 3, "only-3": 1, "only-5": 1},
    }
