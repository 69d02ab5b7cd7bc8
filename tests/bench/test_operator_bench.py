"""What bench/operator computes without a cluster.

Proves: each client's requests are read from the API server's metrics by kind, and nobody else's; every
write but the Lease's counts as one; the tables say the ratio to the bare loop, and what was not measured; a
bound is missed as soon as one write, second or megabyte is too many; text goes between the markers and
nowhere else; what counts as rolled out and as ready follows the object's generation.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from figures import (
    END,
    START,
    Bound,
    Idle,
    Lap,
    Phase,
    Restart,
    Results,
    Singles,
    Spent,
    between_markers,
    bound_table,
    bounds,
    lap_table,
    single_table,
)
from flows import (
    Client,
    children_writes,
    flow_schemas,
    flows,
    per_model,
    requests_of,
    server_cpu_seconds,
    writes,
)
from observer import is_rolled_out, model_serves

OURS = Client("ours", "ns", "operator", "vllm-fleet.dev", "vllmmodels")
DISPATCHED = "apiserver_flowcontrol_dispatched_requests_total"


def dispatched(schema: str, count: str) -> str:
    return f'{DISPATCHED}{{flow_schema="{schema}",priority_level="workload-low"}} {count}'


METRICS = "\n".join(
    (
        f"# HELP {DISPATCHED} [BETA] Number of requests executed by API Priority and Fairness subsystem",
        dispatched("bench-ours-create", "20"),
        dispatched("bench-ours-status", "1.2e+01"),
        dispatched("bench-ours-lease", "7"),
        dispatched("bench-ours-watch", "3"),
        dispatched("bench-other-create", "99"),
        dispatched("exempt", "1004"),
        "process_cpu_seconds_total 12.5",
        "",
    )
)


def test_a_clients_requests_are_its_own() -> None:
    found = requests_of(OURS, METRICS)
    assert found == {"create": 20, "status": 12, "lease": 7, "watch": 3}
    assert server_cpu_seconds(METRICS) == 12.5
    assert (writes(found), children_writes(found)) == (32, 20)
    assert per_model(found, 10) == 3.5  # without the Lease's
    assert requests_of(OURS, "") == {}


def test_each_request_has_one_schema_and_the_narrow_ones_come_first() -> None:
    schemas = flow_schemas(OURS)
    precedences = [schema["spec"]["matchingPrecedence"] for schema in schemas]
    assert precedences == sorted(set(precedences))
    rules = [schema["spec"]["rules"][0]["resourceRules"][0] for schema in schemas]
    verbs = [verb for rule in rules if rule["resources"] == ["*"] for verb in rule["verbs"]]
    known = {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}
    assert sorted(verbs) == sorted(known)
    narrow = [rule["resources"] for rule in rules[:3]]
    assert narrow == [["leases"], ["events"], ["vllmmodels/status"]]
    accounts = [schema["spec"]["rules"][0]["subjects"][0]["serviceAccount"] for schema in schemas]
    assert all(account == {"name": "operator", "namespace": "ns"} for account in accounts)


def test_a_client_without_models_has_no_status_of_its_own() -> None:
    status = next(flow for flow in flows(Client("bare", "ns", "loop")) if flow.name == "status")
    assert (status.group, status.resource) == ("none", "none")


def lap(**changed: Any) -> Lap:
    requests = Counter(changed.get("requests", {"create": 20, "status": 20, "event": 10, "get": 10}))
    created = Phase(changed.get("children", 0.2), changed.get("ready", 1.15), Spent(requests, 0.5, 2.0))
    return Lap(10, created, changed.get("edited"), Phase(3.0, 3.0), changed.get("peak_mb", 199.0))


BARE = Lap(10, Phase(0.1, 1.0, Spent(server_cpu=1.0)), Phase(2.0, 2.0), Phase(1.5, 1.5))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"children": 0.21}, ["10 models: children within 20 ms a model"]),
        ({"ready": 1.16}, ["10 models: ready within 1.15 x the bare loop"]),
        ({"peak_mb": 200.0}, ["10 models: under 200 MB"]),
        ({"requests": {"create": 21}}, ["10 models: a write a child, three more a model"]),
        ({"requests": {"status": 31}}, ["10 models: a write a child, three more a model"]),
    ],
)
def test_a_laps_bounds(changed: dict[str, Any], missed: list[str]) -> None:
    found = bounds(Results("ours", [lap(**changed)], [BARE]))
    assert len(found) == 4
    assert [bound.what for bound in found if not bound.holds] == missed


def test_bounds_of_single_models_are_of_the_median() -> None:
    slow_once = Singles([0.1, 0.2, 9.0], [0.1, 0.2, 9.0], [0.1, 1.0, 9.0])
    found = bounds(Results("ours", singles=slow_once))
    assert [bound.holds for bound in found] == [True, True, False]


def test_nothing_is_written_while_idle_and_after_a_restart() -> None:
    calm = Results("ours", idle=Idle(500, 60.0, 0.59, 0), restart=Restart(1000, 2.0, 1.0, 150.0, 0))
    assert [bound.holds for bound in bounds(calm)] == [True, True, True]
    busy = Results("ours", idle=Idle(500, 60.0, 0.61, 1), restart=Restart(1000, 2.0, 1.0, 150.0, 1))
    assert [bound.holds for bound in bounds(busy)] == [False, False, False]


def test_the_table_of_laps() -> None:
    text = lap_table(Results("ours", [lap(edited=Phase(5.0, 6.0, Spent(cpu=1.0))), lap()], [BARE]))
    lines = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines())
    assert lines["ours"] == "10 models | 10 models"
    assert lines["all ready"] == "1.1 s (1.15 x 1.0) | 1.1 s"
    assert lines["all edited and ready again"] == "6.0 s (3.00 x 2.0) | not measured"
    assert lines["CPU of the API server, create"] == "2.0 s (2.00 x 1.0) | 2.0 s"
    assert lines["CPU of the operator, create"] == "0.5 s (50.0 ms a model) | 0.5 s (50.0 ms a model)"
    assert lines["its requests a model, create"].startswith("6.0: create 2, status 2, ")
    assert lines["its requests a model, edit"] == "none | not measured"


def test_the_table_of_the_rest() -> None:
    results = Results("ours", singles=Singles([0.1, 0.3], [], [0.2]), idle=Idle(5, 60.0, 0.3, 0))
    text = single_table(results)
    assert "0.200 s (worst of 2: 0.300 s)" in text
    assert "| pod ready → model ready | none |" in text
    assert "| idle, 5 models | 0.50 % of a core, 0 writes in 60 s |" in text
    assert "restart" not in text


def test_a_bound_is_told_as_ok_or_missed() -> None:
    text = bound_table([Bound("a", "1", holds=True), Bound("b", "2", holds=False)])
    assert text.splitlines()[2:] == ["| a | 1 | ok |", "| b | 2 | missed |"]


def test_text_goes_between_the_markers() -> None:
    start, end = START.format(""), END.format("")
    other = f"{START.format(' QPS')}\nother\n{END.format(' QPS')}\n"
    document = f"before\n{other}{start}\nold\n{end}\nafter\n"
    once = between_markers(document, "new\n")
    assert once == f"before\n{other}{start}\n\nnew\n\n{end}\nafter\n"
    assert between_markers(once, "new\n") == once
    assert between_markers(once, "n", " QPS") == once.replace("\nother\n", "\n\nn\n\n")
    with pytest.raises(ValueError, match="bench/operator"):
        between_markers(f"{START.format('')} and no end", "new")


@pytest.mark.parametrize(
    ("status", "rolled_out"),
    [
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, True),
        ({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 2}, False),
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1}, False),
        ({}, False),
    ],
)
def test_rolled_out(status: dict[str, int], rolled_out: bool) -> None:
    assert (
        is_rolled_out({"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": status})
        is rolled_out
    )


def model(observed: int, **conditions: str) -> dict[str, Any]:
    listed = [{"type": name, "status": value} for name, value in conditions.items()]
    return {"metadata": {"generation": 2}, "status": {"observedGeneration": observed, "conditions": listed}}


def test_a_model_serves() -> None:
    assert model_serves(model(2, Ready="True"))
    assert not model_serves(model(1, Ready="True"))
    assert not model_serves(model(2, Ready="True", Reconciling="True"))
    assert not model_serves(model(2, Ready="False"))
    assert not model_serves({"metadata": {"generation": 1}})
