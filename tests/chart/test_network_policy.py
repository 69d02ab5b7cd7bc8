"""Who may open a connection to whom, by the policies that the chart and the operator render.

Proves, by evaluating the policies (the bridge plugin of the local cluster does not enforce them; the same on
real objects is in tests/e2e): everyone reaches the API and no other port; only scrapers and the operator
reach metrics; nobody else reaches the operator; a model's pods take connections from this release's gateways,
from scrapers and from what the settings add, and from no other pod, not even another model's; egress is open
unless asked for, and then reaches DNS, the API server and the models only; values narrow and widen each; and
that the evaluator follows the rules of NetworkPolicies.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from network_policy import Network, Pod

from vllm_operator.api.parsing import parse
from vllm_operator.render import render as render_model
from vllm_operator.settings import parse_settings

Values = dict[str, Any]
HOME, TEAM = "vllm-fleet", "team-a"
NAMESPACES = {name: {"kubernetes.io/metadata.name": name} for name in (HOME, TEAM, "monitoring", "other")}
STRANGER = Pod("other", {"app": "anything"})
NEIGHBOUR = Pod(HOME, {"app": "anything"})
OUTSIDE = Pod("", {}, ip="203.0.113.7")
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
API_SERVER = Pod("", {}, ip="192.0.2.1")


class Fleet:
    """A release with these values, and two models of TEAM that its operator would render."""

    def __init__(self, manifests: list[Values]) -> None:
        pods = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Deployment"}
        self.operator = self._pod(pods["vllm-fleet-operator"])
        self.gateway = self._pod(pods["vllm-fleet-gateway"])
        self.tester = next((Pod.of(m) for m in manifests if m["kind"] == "Pod"), STRANGER)
        rendered = [*manifests, *self._models(manifests)]
        self.engine, self.other_engine = (
            self._pod(m)
            for m in rendered
            if m["kind"] == "Deployment" and m["metadata"]["name"].endswith("-engine")
        )
        self.network = Network(tuple(m for m in rendered if m["kind"] == "NetworkPolicy"), NAMESPACES)

    @staticmethod
    def _pod(workload: Any) -> Pod:
        template = workload["spec"]["template"]
        namespace = workload["metadata"]["namespace"]
        return Pod.of({**template, "metadata": {**template["metadata"], "namespace": namespace}})

    @staticmethod
    def _models(manifests: list[Values]) -> list[Any]:
        """What the operator makes of two models under the configuration that it is given."""
        (config,) = (m["data"]["operator.yaml"] for m in manifests if "operator.yaml" in m.get("data", {}))
        settings = parse_settings(yaml.safe_load(config), "operator.yaml")
        bodies = (
            {
                "apiVersion": "vllm-fleet.dev/v1alpha1",
                "kind": "VLLMModel",
                "metadata": {"namespace": TEAM, "name": name, "uid": f"uid-{name}"},
                "spec": {"model": "org/model"},
            }
            for name in ("one", "two")
        )
        return [manifest for body in bodies for manifest in render_model(parse(body), settings)]

    def allows(self, source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
        return self.network.allows(source, target, port, protocol)


@pytest.fixture
def fleet(render: Any) -> Any:
    return lambda values=None: Fleet(render(values or {}))


def test_everyone_reaches_the_api_and_no_other_port(fleet: Any) -> None:
    release = fleet()
    for caller in (STRANGER, NEIGHBOUR, OUTSIDE, release.tester):
        assert release.allows(caller, release.gateway, 3000)
        assert not release.allows(caller, release.gateway, 9090)
        assert not release.allows(caller, release.operator, 9090)
        assert not release.allows(caller, release.operator, 3000)


def test_metrics_are_for_scrapers_and_for_the_operator(fleet: Any) -> None:
    release = fleet()
    for target, port in ((release.gateway, 9090), (release.operator, 9090), (release.engine, 8000)):
        assert release.allows(PROMETHEUS, target, port)
    assert release.allows(release.operator, release.gateway, 9090)
    assert not release.allows(release.gateway, release.operator, 9090)


def test_a_model_takes_this_gateway_and_nobody_else(fleet: Any) -> None:
    release = fleet()
    assert release.allows(release.gateway, release.engine, 8000)
    elsewhere = Pod("other", release.gateway.labels)
    lookalike = Pod(HOME, {**release.gateway.labels, "app.kubernetes.io/instance": "another-release"})
    for caller in (
        STRANGER,
        NEIGHBOUR,
        OUTSIDE,
        release.operator,
        release.other_engine,
        elsewhere,
        lookalike,
    ):
        assert not release.allows(caller, release.engine, 8000)
    assert not release.allows(release.gateway, release.engine, 22)


def test_values_narrow_and_widen(fleet: Any) -> None:
    eval_pod = Pod("other", {"team": "eval"})
    release = fleet(
        {
            "networkPolicy": {"scrapers": [{"namespaceLabels": NAMESPACES["other"]}]},
            "operator": {"config": {"networkPolicy": {"allowFrom": [{"podLabels": {"team": "eval"}}]}}},
            "gateway": {"networkPolicy": {"ingress": [{"from": [{"podSelector": {}}]}]}},
        }
    )
    assert not release.allows(PROMETHEUS, release.engine, 8000)
    assert release.allows(STRANGER, release.engine, 8000)  # a scraper now, by its namespace
    assert release.allows(eval_pod, release.engine, 8000)
    assert release.allows(NEIGHBOUR, release.gateway, 3000)
    assert release.allows(release.tester, release.gateway, 3000)
    assert not release.allows(STRANGER, release.gateway, 3000)
    assert not release.allows(OUTSIDE, release.gateway, 3000)


def test_without_scrapers_only_the_operator_reads(fleet: Any) -> None:
    release = fleet({"networkPolicy": {"scrapers": []}})
    assert not release.allows(PROMETHEUS, release.operator, 9090)
    assert not release.allows(PROMETHEUS, release.engine, 8000)
    assert release.allows(release.operator, release.gateway, 9090)


def test_all_is_open_where_policies_are_off(fleet: Any) -> None:
    release = fleet({"networkPolicy": {"enabled": False}})
    assert release.network.policies == ()
    peers = [{"podLabels": {"a": "b"}}]
    own = {"operator": {"config": {"networkPolicy": {"allowFrom": peers}}}}
    assert len(fleet({"networkPolicy": {"enabled": False}} | own).network.policies) == 2


def test_egress_is_open_unless_asked_for(fleet: Any) -> None:
    release = fleet()
    for source in (release.gateway, release.operator):
        assert release.allows(source, OUTSIDE, 443)
        assert release.allows(source, OUTSIDE, 25)


@pytest.mark.parametrize("namespaces", [[], [TEAM]])
def test_closed_egress_leaves_what_each_needs(fleet: Any, namespaces: list[str]) -> None:
    release = fleet({"networkPolicy": {"egress": {"enabled": True}}, "watchNamespaces": namespaces})
    for source in (release.gateway, release.operator):
        assert release.allows(source, API_SERVER, 6443)
        assert release.allows(source, OUTSIDE, 53, "UDP")
        assert not release.allows(source, OUTSIDE, 25)
        assert not release.allows(source, STRANGER, 8000)
    assert release.allows(release.gateway, release.engine, 8000)
    assert release.allows(release.operator, release.gateway, 9090)
    valkey = Pod(HOME, {"app": "valkey"})
    assert not release.allows(release.gateway, valkey, 6379)
    opened = fleet(
        {
            "networkPolicy": {"egress": {"enabled": True}},
            "gateway": {
                "networkPolicy": {"egress": [{"to": [{"podSelector": {"matchLabels": {"app": "valkey"}}}]}]}
            },
        }
    )
    assert opened.allows(opened.gateway, valkey, 6379)
    assert not opened.allows(opened.operator, valkey, 6379)


def policy(**spec: Any) -> Values:
    return {"metadata": {"namespace": TEAM}, "spec": {"podSelector": {}, **spec}}


TARGET = Pod(TEAM, {"app": "db"}, {"sql": 5432})


@pytest.mark.parametrize(
    ("policies", "allowed"),
    [
        ([], True),
        ([policy()], False),
        ([policy(ingress=[{}])], True),
        ([policy(podSelector={"matchLabels": {"app": "web"}})], True),
        ([policy(policyTypes=["Egress"])], True),
        ([policy(ingress=[{"ports": [{"port": "sql"}]}])], True),
        ([policy(ingress=[{"ports": [{"port": "sql", "protocol": "UDP"}]}])], False),
        ([policy(ingress=[{"ports": [{"port": 5000, "endPort": 6000}]}])], True),
        ([policy(ingress=[{"ports": [{"port": 80}]}])], False),
        ([policy(ingress=[{"from": [{"podSelector": {}}]}])], False),  # of the policy's own namespace
        ([policy(ingress=[{"from": [{"namespaceSelector": {}}]}])], True),
        (
            [
                policy(
                    ingress=[
                        {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"a": "c"}}}]}
                    ]
                )
            ],
            False,
        ),
        (
            [
                policy(
                    ingress=[
                        {"from": [{"namespaceSelector": {}}, {"podSelector": {"matchLabels": {"a": "c"}}}]}
                    ]
                )
            ],
            True,
        ),
        ([policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}])], True),
        (
            [policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.0.0/16"]}}]}])],
            False,
        ),
        ([policy(), policy(ingress=[{}])], True),  # policies add up
        (
            [policy(podSelector={"matchExpressions": [{"key": "app", "operator": "In", "values": ["db"]}]})],
            False,
        ),
        (
            [
                policy(
                    podSelector={"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]}
                )
            ],
            True,
        ),
        ([policy(podSelector={"matchExpressions": [{"key": "app", "operator": "Exists"}]})], False),
        ([policy(podSelector={"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]})], True),
    ],
)
def test_the_evaluator_follows_the_rules(policies: list[Values], allowed: bool) -> None:
    network = Network(tuple(policies), NAMESPACES)
    assert network.allows(STRANGER, TARGET, 5432) is allowed


def test_both_ends_must_agree() -> None:
    closed = {"metadata": {"namespace": "other"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"]}}
    assert not Network((closed,), NAMESPACES).allows(STRANGER, TARGET, 5432)
