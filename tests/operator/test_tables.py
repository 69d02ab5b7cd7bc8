"""What the operator computes from its tables: short names, free GPUs, and whether a live object is as wanted.

Proves: between namespaces the oldest holds a name, ties by namespace and name, the next gets it when the
holder goes or changes; who is concerned by a change is told; stale news are no news; a complete list removes
what is missing and not younger; nothing is kept that is never read; GPUs held are counted per node whatever
the order of events, and a node's changes are seen though what is known of it is kept; a live object
equals what was rendered although the server added defaults and normal forms, and any owned field that
differs is a difference.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kube_store import apply_patch
from vllm_models import model_body

from vllm_operator.api.parsing import parse
from vllm_operator.compare import contains, differs, same_quantity
from vllm_operator.fleet import Fleet
from vllm_operator.inventory import NodeLedger, slim_node, slim_pod
from vllm_operator.names import ModelKey
from vllm_operator.render import render
from vllm_operator.settings import Settings

Json = dict[str, Any]


def body(namespace: str, name: str, *served: str, made: int = 0, version: int = 1, uid: str = "") -> Json:
    found = model_body(name, namespace, **({"servedNames": list(served)} if served else {}))
    created = f"2026-01-01T00:00:{made:02}Z"
    found["metadata"] |= {
        "creationTimestamp": created,
        "resourceVersion": str(version),
        "uid": uid or f"{namespace}/{name}",
    }
    return found


def key(text: str) -> ModelKey:
    return ModelKey(*text.split("/"))


def fleet_of(*bodies: Json) -> Fleet:
    fleet = Fleet()
    for item in random.Random(1).sample(bodies, len(bodies)):
        fleet.put(item)
    return fleet


# Short names


def test_the_oldest_namespace_holds_a_name_and_its_models_share_it() -> None:
    fleet = fleet_of(
        body("b", "one", "chat", made=1),
        body("a", "two", "chat", made=2),
        body("b", "three", "chat", "own", made=3),
    )
    assert fleet.granted(key("b/one")) == ("chat",)
    assert fleet.granted(key("b/three")) == ("chat", "own")
    assert fleet.granted(key("a/two")) == ()
    assert list(fleet.denied(key("a/two"))) == [("chat", key("b/one"))]


def test_adapters_claim_names_beside_their_model() -> None:
    old, new = body("a", "old", "chat", made=1), body("b", "new", made=2)
    new["spec"]["adapters"] = [{"name": "chat"}, {"name": "sql"}, {"name": 3}, "sql"]
    fleet = fleet_of(old, new)
    assert fleet.granted(key("b/new")) == ("new",)
    assert fleet.granted_adapters(key("b/new")) == ("sql",)
    assert list(fleet.denied(key("b/new"))) == [("chat", key("a/old"))]
    assert fleet.remove(key("a/old")) == {key("a/old"), key("b/new")}
    assert fleet.granted_adapters(key("b/new")) == ("chat", "sql")


def test_ties_go_by_namespace_and_name() -> None:
    fleet = fleet_of(body("b", "x", "chat"), body("a", "z", "chat"), body("a", "y", "chat"))
    assert fleet.holder("chat") == key("a/y")


def test_a_name_passes_on_when_its_holder_goes_or_changes() -> None:
    fleet = fleet_of(body("a", "old", "chat", made=1), body("b", "new", "chat", made=2))
    assert fleet.put(body("a", "old", "other", made=1, version=2)) == {key("a/old"), key("b/new")}
    assert fleet.granted(key("b/new")) == ("chat",)
    assert fleet.put(body("a", "old", "chat", made=1, version=3)) == {key("a/old"), key("b/new")}
    assert fleet.granted(key("b/new")) == ()
    assert fleet.remove(key("a/old")) == {key("a/old"), key("b/new")}
    assert fleet.granted(key("b/new")) == ("chat",)


def test_a_default_name_is_a_name_like_others() -> None:
    fleet = fleet_of(body("a", "llama", made=1), body("b", "llama", made=2))
    assert fleet.granted(key("a/llama")) == ("llama",)
    assert fleet.granted(key("b/llama")) == ()


def test_names_of_an_invalid_model_are_read_as_far_as_they_can_be() -> None:
    broken = body("a", "m")
    broken["spec"]["servedNames"] = [3]
    assert fleet_of(broken).granted(key("a/m")) == ("m",)


def test_stale_news_are_no_news() -> None:
    fleet = fleet_of(body("a", "m", version=5))
    assert fleet.put(body("a", "m", version=5)) is None
    assert fleet.put(body("a", "m", version=4)) is None
    assert fleet.put(body("a", "m", version=3, uid="made anew")) == {key("a/m")}
    assert fleet.remove(key("a/m"), "another uid") == set()
    assert fleet.remove(key("a/m"), "made anew") == {key("a/m")}


def test_a_models_managed_fields_are_not_kept() -> None:
    loaded = body("a", "m")
    loaded["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    assert "managedFields" not in fleet_of(loaded).models[key("a/m")]["metadata"]


def test_a_complete_list_removes_what_is_missing_and_not_younger() -> None:
    fleet = fleet_of(
        body("a", "gone", version=5), body("a", "young", version=12), body("a", "stays", version=6)
    )
    assert fleet.replace([body("a", "stays", version=6)], version=10) == {key("a/gone")}
    assert set(fleet.models) == {key("a/young"), key("a/stays")}


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sets(st.sampled_from("NM"))), max_size=12
    )
)
def test_every_name_asked_for_is_held_by_one_namespace(steps: list[tuple[str, str, set[str]]]) -> None:
    fleet = Fleet()
    for version, (namespace, name, served) in enumerate(steps, 1):
        if served:
            fleet.put(body(namespace, name, *sorted(served), version=version))
        else:
            fleet.remove(ModelKey(namespace, name))
    for wanted in "NM":
        holders = {item.namespace for item in fleet.models if wanted in fleet.granted(item)}
        asked = [item for item in fleet.models if wanted in fleet.models[item]["spec"]["servedNames"]]
        assert len(holders) == (1 if asked else 0)


# GPUs


def pod(name: str, node: str = "n", gpus: int = 1, phase: str = "Running", init: int = 0) -> Json:
    def container(count: int) -> Json:
        return {"resources": {"limits": {"nvidia.com/gpu": str(count), "cpu": "1"}}}

    spec = {"nodeName": node, "containers": [container(gpus)], "initContainers": [container(init)]}
    return slim_pod({"metadata": {"name": name, "namespace": "ns"}, "spec": spec, "status": {"phase": phase}})


def free(ledger: NodeLedger, **conditions: str) -> int:
    ready = {"type": "Ready", "status": conditions.get("ready", "True")}
    node = {
        "metadata": {"name": "n"},
        "status": {"allocatable": {"nvidia.com/gpu": "8", "memory": "9Ki"}, "conditions": [ready]},
    }
    return ledger.nodes([slim_node(node)])[0].free["nvidia.com/gpu"]


def test_gpus_are_counted_as_pods_come_and_go() -> None:
    ledger = NodeLedger()
    a, b = pod("a", gpus=2), pod("b", init=3)
    ledger.note(None, a)
    ledger.note(None, b)
    assert free(ledger) == 3
    ledger.note(a, pod("a", gpus=2, phase="Succeeded"))
    assert free(ledger) == 5
    ledger.note(pod("a", gpus=2, phase="Succeeded"), None)
    ledger.note(b, None)
    assert free(ledger) == 8


def test_nothing_is_kept_of_a_node_without_pods() -> None:
    """Autoscalers make nodes and end them for months, each with a name of its own."""
    ledger = NodeLedger()
    for number in range(100):
        came, moved = pod("a", node=""), pod("a", node=f"n{number}")
        ledger.note(None, came)
        ledger.note(came, moved)
        ledger.note(moved, pod("a", node=f"n{number}", phase="Succeeded"))
        ledger.note(pod("a", node=f"n{number}", phase="Succeeded"), None)
    assert (len(ledger._pods), len(ledger._held)) == (0, 0)


def test_a_node_that_changes_is_seen() -> None:
    ledger = NodeLedger()
    before = slim_node({"metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}})
    after = slim_node({"metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}})
    ledger.note_node(None, before)
    ledger.note(None, pod("a"))
    (known,) = ledger.nodes([before])
    assert ledger.nodes([before])[0] is known
    ledger.note_node(before, after)
    assert [node.free for node in ledger.nodes([after])] == [{"nvidia.com/gpu": 3}]


def test_cpu_and_memory_are_counted_too() -> None:
    ledger = NodeLedger()
    ledger.note(None, pod("a"))
    offers = {"cpu": "4", "memory": "9Ki", "nvidia.com/gpu": "8", "pods": "110", "ephemeral-storage": "1Gi"}
    node = {"metadata": {"name": "n"}, "status": {"allocatable": offers}}
    found = ledger.nodes([slim_node(node)])[0].free
    assert found == {"cpu": 3000, "memory": 9216, "nvidia.com/gpu": 7}


def test_a_pod_without_a_node_holds_nothing() -> None:
    ledger = NodeLedger()
    ledger.note(None, pod("a", node=""))
    assert free(ledger) == 8


def test_only_what_is_needed_of_strangers_pods_is_kept() -> None:
    stranger = pod("a")
    assert set(stranger) == {"metadata", "spec", "holds"}


def test_a_node_that_is_not_ready_or_cordoned_is_not_schedulable() -> None:
    ready = {"type": "Ready", "status": "True"}
    assert slim_node({"metadata": {"name": "n"}, "status": {"conditions": [ready]}})["schedulable"]
    assert not slim_node({"metadata": {"name": "n"}, "status": {"conditions": []}})["schedulable"]
    cordoned = {"metadata": {"name": "n"}, "spec": {"unschedulable": True}, "status": {"conditions": [ready]}}
    assert not slim_node(cordoned)["schedulable"]


# As wanted?


def deployment(**spec: Any) -> Json:
    return copy.deepcopy(render(parse(model_body(**spec)), Settings())[1])


def as_the_server_keeps_it(wanted: Json) -> Json:
    """With defaults and normal forms, as seen on Kubernetes 1.37."""
    live = copy.deepcopy(wanted)
    live["metadata"] |= {"uid": "u", "resourceVersion": "1", "generation": 1}
    live["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "1"
    pod_spec = live["spec"]["template"]["spec"]
    pod_spec |= {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
    container = pod_spec["containers"][0]
    container |= {"imagePullPolicy": "IfNotPresent", "terminationMessagePath": "/dev/termination-log"}
    container["startupProbe"]["successThreshold"] = 1
    container["startupProbe"]["httpGet"]["scheme"] = "HTTP"
    live["status"] = {"replicas": 1}
    return live


def test_defaults_of_the_server_are_no_difference() -> None:
    wanted = deployment(resources={"requests": {"cpu": "1000m", "memory": "0.5Gi"}})
    live = as_the_server_keeps_it(wanted)
    live["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"] = {
        "cpu": "1",
        "memory": "512Mi",
    }
    assert not differs(wanted, live)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        found += paths(inner, (*path, name))
    return found


WANTED = deployment(
    engine={"env": [{"name": "A", "value": "1"}]},
    resources={"requests": {"cpu": "2"}},
    scheduling={"nodeSelector": {"a": "b"}},
)


@given(st.sampled_from(paths(WANTED)), st.booleans())
def test_any_owned_field_that_is_changed_or_removed_is_a_difference(
    path: tuple[Any, ...], remove: bool
) -> None:
    live = as_the_server_keeps_it(WANTED)
    holder: Any = live
    for part in path[:-1]:
        holder = holder[part]
    was = holder[path[-1]]
    if remove:
        del holder[path[-1]]
    else:
        holder[path[-1]] = "changed"
    empty = was in ({}, []) and remove
    assert differs(WANTED, live) is not empty


def test_what_others_added_is_left_alone() -> None:
    live = as_the_server_keeps_it(WANTED)
    live["metadata"]["labels"]["team"] = "a"
    live["spec"]["template"]["spec"]["containers"].append({"name": "sidecar"})
    assert not differs(WANTED, live)


def test_an_apply_ends_the_difference() -> None:
    newer = deployment(engine={"maxModelLen": 5}, replicas=2)
    live = as_the_server_keeps_it(WANTED)
    assert differs(newer, live)
    assert not differs(newer, apply_patch(live, WANTED, newer))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1", 1, True),
        ("1000m", "1", True),
        ("1Gi", "1024Mi", True),
        ("1G", "1Gi", False),
        ("x", "x", False),
        ("1", "2", False),
    ],
)
def test_quantities(one: Any, other: Any, same: bool) -> None:
    assert same_quantity(one, other) is same


def test_a_quantity_is_one_only_where_quantities_stand() -> None:
    assert not contains({"args": ["1000m"]}, {"args": ["1"]})
    assert contains({"limits": {"cpu": "1"}}, {"limits": {"cpu": "1000m"}})
