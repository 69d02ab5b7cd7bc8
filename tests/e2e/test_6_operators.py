"""Operators that die, meet each other, and lose sight of a real API server.

Proves, of the list of failures that the project is judged by:
E18  a deletion that no watch told of heals: of a child, and of a model that held a name, after a 410 too.
E20  an operator killed, or cut off, right after any of its writes leaves nothing that its next start does
     not bring to the same end: one Deployment, one ReplicaSet, one Service, none of them made twice.
E21  of two operators one writes; the other takes over in seconds after SIGTERM and when the lease has run out
     after a kill; one that is parted from the API server stops in time, and what it had under way when the
     other took over never arrives.
E22  a model is deleted at once where no operator is; one that is deleted in a rollout, over an API server
     that refuses every second write, is gone for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import cluster
import pytest
from api_proxy import Answer, Call
from operators import Operators, OwnOperator, model, own_namespace

pytestmark = pytest.mark.e2e
ENGINE = "m-engine"


@pytest.fixture
def other_namespace() -> Iterator[str]:
    """For models that must not be neighbours."""
    with own_namespace() as name:
        yield name


def reason(name: str, namespace: str) -> str:
    return str(cluster.condition(name, "Ready", namespace).get("reason", ""))


def wait_served(name: str, namespace: str, seconds: float = 60) -> None:
    cluster.eventually(lambda: reason(name, namespace), f"{name} has a status", seconds, 0.1)


def nth_write(number: int, act: Callable[[], None]) -> Callable[[Call], None]:
    """Acts when so many writes have been made."""
    made = count(1)

    def answered(call: Call) -> None:
        if call.is_write and next(made) == number:
            act()

    return answered


def whole(namespace: str, name: str = "m") -> dict[str, list[str]]:
    """The uids of a model's children by kind, once each is there and the status is written."""
    wait_served(name, namespace)
    kinds = ("deployments", "replicasets", "services")
    cluster.eventually(
        lambda: all(cluster.items(kind, f"vllm-fleet.dev/model={name}", namespace) for kind in kinds),
        "all children are there",
        60,
    )
    found = {kind: cluster.items(kind, f"vllm-fleet.dev/model={name}", namespace) for kind in kinds}
    return {kind: [item["metadata"]["uid"] for item in items] for kind, items in found.items()}


def test_a_child_deleted_unseen_is_back(operators: Operators, namespace: str) -> None:
    """E18: the watch is gone while it happens."""
    one = operators.start()
    cluster.apply(model("m"), namespace)
    before = whole(namespace)
    one.proxy.part()
    one.proxy.cut()
    cluster.delete("deployment", ENGINE, namespace)
    one.proxy.join()
    joined = time.monotonic()
    cluster.eventually(lambda: cluster.get("deployment", ENGINE, namespace), "it is back", 60, 0.05)
    print(f"Deployment back {time.monotonic() - joined:.2f} s after the connection")
    assert whole(namespace)["deployments"] != before["deployments"]


def test_a_model_deleted_unseen_gives_its_name_away(
    operators: Operators, namespace: str, other_namespace: str
) -> None:
    """E18: kopf lists again after a 410 and tells of no deletion; the operator's own list does."""
    first, second = namespace, other_namespace
    one = operators.start(resyncSeconds=10, watchNamespaces=[first, second])
    cluster.apply(model("old", servedNames=["shared"]), first)
    wait_served("old", first)
    time.sleep(1.1)  # the older one has the name, and creation times are whole seconds
    cluster.apply(model("new", servedNames=["shared"]), second)
    cluster.eventually(
        lambda: cluster.condition("new", "Accepted", second).get("reason") == "NameConflict",
        "the name is taken",
        60,
    )
    expired = iter([Answer(410, "too old resource version", "Expired")])

    def expire_once(call: Call) -> Answer | None:
        its_models = call.watches and call.path.endswith(f"/namespaces/{first}/vllmmodels")
        return next(expired, None) if its_models else None

    one.proxy.script = expire_once
    one.proxy.part()
    one.proxy.cut()
    cluster.delete("vllm", "old", first)
    one.proxy.join()
    cluster.eventually(
        lambda: (cluster.get("vllm", "new", second) or {})["status"]["servedNames"] == ["shared"],
        "the name is free",
        90,
    )


@pytest.mark.parametrize("blow", ["killed", "cut off"])
@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["Service", "Deployment", "status", "Event"])
def test_an_operator_that_falls_between_two_writes(
    operators: Operators, namespace: str, number: int, blow: str
) -> None:
    """E20: the write is made, and its answer is never heard."""
    one = operators.start()
    assert one.process is not None
    fall = one.process.kill if blow == "killed" else one.proxy.cut
    one.proxy.answered = nth_write(number, fall)
    cluster.apply(model("m"), namespace)
    cluster.eventually(lambda: len(answered_writes(one)) >= number, f"write {number}", 60, 0.05)
    survivors = {
        item["metadata"]["uid"]
        for kind in ("deployments", "services")
        for item in cluster.items(kind, "vllm-fleet.dev/model=m", namespace)
    }
    if blow == "killed":
        one.process.wait(60)
        assert len(one.proxy.writes()) == number
        one.start()
    one.wait_leading()
    whole(namespace)
    one.wait_silent()
    children = whole(namespace)
    assert {kind: len(uids) for kind, uids in children.items()} == {
        "deployments": 1,
        "replicasets": 1,
        "services": 1,
    }
    assert survivors <= {uid for uids in children.values() for uid in uids}
    deployment = cluster.get("deployment", ENGINE, namespace)
    assert deployment
    assert deployment["metadata"]["generation"] == 1, "the Deployment was written a second time"


def answered_writes(one: OwnOperator) -> list[Call]:
    """The writes of which the API server has said what became of them."""
    return [call for call in one.proxy.writes() if call.status]


def test_a_hand_over_takes_seconds(operators: Operators, namespace: str) -> None:
    """E21: with the lease's own defaults, which are Kubernetes' own."""
    one, two = (operators.make(name, lease={}) for name in ("one", "two"))
    one.start().wait_leading()
    two.start()
    cluster.eventually(two.ready, "the second stands by", 60)
    cluster.apply(model("m"), namespace)
    wait_served("m", namespace)
    assert not two.proxy.writes()
    assert not two.leads()

    one.terminate()
    print(f"the second leads {two.wait_leading():.1f} s after SIGTERM")
    cluster.patch_spec("m", {"replicas": 2}, namespace)
    wait_replicas(namespace, 2)

    one.proxy.requests.clear()
    one.start()
    cluster.eventually(one.ready, "the first stands by", 60)
    two.kill()
    print(f"the first leads {one.wait_leading():.1f} s after SIGKILL of the second")
    cluster.patch_spec("m", {"replicas": 1}, namespace)
    wait_replicas(namespace, 1)
    assert not one.proxy.requests[0].is_write


def wait_replicas(namespace: str, number: int) -> None:
    cluster.eventually(
        lambda: (cluster.get("deployment", ENGINE, namespace) or {})["spec"]["replicas"] == number,
        f"{number} replicas",
        60,
        0.1,
    )


def test_a_leader_that_is_parted_writes_no_more(operators: Operators, namespace: str) -> None:
    """E21: its write is under way when the network goes, and the other's comes first."""
    one = operators.start("one")
    two = operators.make("two").start()
    cluster.eventually(two.ready, "the second stands by", 60)
    cluster.apply(model("m"), namespace)
    wait_served("m", namespace)

    def part_at_the_deployment(call: Call) -> None:
        if call.method == "PATCH" and call.path.endswith(f"/deployments/{ENGINE}"):
            one.proxy.part()

    one.proxy.script = part_at_the_deployment
    cluster.patch_spec("m", {"replicas": 2}, namespace)
    two.wait_leading()
    took_over = time.monotonic()
    wait_replicas(namespace, 2)
    held = [call for call in one.proxy.writes() if call.status == 0]
    assert held, "the first had a write under way"
    assert not one.leads()
    cluster.patch_spec("m", {"replicas": 3}, namespace)
    wait_replicas(namespace, 3)

    one.proxy.join()
    cluster.eventually(one.ready, "the first stands by", 60)
    cluster.patch_spec("m", {"replicas": 1}, namespace)
    wait_replicas(namespace, 1)
    assert [call for call in held if call.status] == [], "it came through after all"
    assert [call for call in one.proxy.writes() if call.at > took_over] == []
    assert (one.leads(), two.leads()) == (False, True)


def test_a_model_goes_without_any_operator(operators: Operators, namespace: str) -> None:
    """E22: no finalizer waits for anybody."""
    one = operators.start()
    cluster.apply(model("m"), namespace)
    whole(namespace)
    one.kill()
    began = time.monotonic()
    cluster.kubectl("-n", namespace, "delete", "vllm", "m", "--timeout=60s")
    print(f"model deleted in {time.monotonic() - began:.2f} s without an operator")
    kinds = "deployments,replicasets,services,pods"
    cluster.eventually(
        lambda: not cluster.items(kinds, "vllm-fleet.dev/model=m", namespace), "its children are gone", 120
    )


def test_a_model_deleted_in_a_rollout_stays_deleted(operators: Operators, namespace: str) -> None:
    """E22: and the API server refuses every second write meanwhile."""
    one = operators.start()
    turns = count()

    def refuse_every_second(call: Call) -> Answer | None:
        return Answer(503, "overloaded") if call.is_write and next(turns) % 2 == 0 else None

    one.proxy.script = refuse_every_second
    cluster.apply(model("m"), namespace)
    whole(namespace)
    cluster.patch_spec("m", {"engine": {"maxModelLen": 1024}}, namespace)
    cluster.eventually(lambda: len(whole(namespace)["replicasets"]) == 2, "the rollout has begun", 60)
    cluster.delete("vllm", "m", namespace)
    kinds = "deployments,replicasets,services,pods"
    cluster.eventually(
        lambda: not cluster.items(kinds, "vllm-fleet.dev/model=m", namespace), "its children are gone", 120
    )
    one.wait_silent()
    assert one.ready()
    assert not cluster.items(kinds, "vllm-fleet.dev/model=m", namespace)
