"""What our pods may do: in the API, by the exact list of rights, and on the node, by Pod Security
"restricted".

Proves: the rights of each service account, cluster-wide and in namespaced mode, are these and no more;
namespaced mode leaves nothing of cluster scope but the definition; two releases in one namespace have two
leases, and each the right to its own; no Secret but the master key can be read
unless asked for;
pods pass "restricted", and the check of that finds each breach.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import helm

READ = ("get", "list", "watch")
CHILD = (*READ, "create", "patch", "delete")
OPERATOR = {
    ("vllm-fleet.dev", "vllmmodels"): READ,
    ("vllm-fleet.dev", "vllmmodels/status"): ("patch",),
    ("apps", "deployments"): CHILD,
    ("", "services"): CHILD,
    ("networking.k8s.io", "networkpolicies"): CHILD,
    ("", "persistentvolumeclaims"): (*READ, "create", "patch"),
    ("batch", "jobs"): CHILD,
    ("leaderworkerset.x-k8s.io", "leaderworkersets"): CHILD,
    ("policy", "poddisruptionbudgets"): CHILD,
    ("", "pods"): READ,
    ("", "events"): ("list", "watch", "create"),
    ("autoscaling", "horizontalpodautoscalers"): ("list", "watch"),
    ("", "secrets"): ("create",),
}
SECRETS = {("", "secrets"): ("list", "watch", "create")}
NODES = {("", "nodes"): READ}
GATEWAY = {("vllm-fleet.dev", "vllmmodels"): READ, ("discovery.k8s.io", "endpointslices"): READ}
LEASE = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["vllm-operator"],
        "verbs": ["get", "update"],
    },
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
    {
        "apiGroups": [""],
        "resources": ["secrets"],
        "resourceNames": ["vllm-fleet-engine-keys"],
        "verbs": ["get"],
    },
]
CLUSTER_KINDS = {"ClusterRole", "ClusterRoleBinding"}


def granted(rules: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[str, ...]]:
    rights: dict[tuple[str, str], tuple[str, ...]] = {}
    for rule in rules:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                rights[group, resource] = (*rights.get((group, resource), ()), *rule["verbs"])
    return rights


def bound(manifests: list[dict[str, Any]], account: str) -> Iterator[tuple[str | None, str, str]]:
    """Namespace, kind and name of every role bound to a service account of the release's namespace."""
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "vllm-fleet"}
    for manifest in manifests:
        if manifest["kind"].endswith("RoleBinding"):
            assert len(manifest["subjects"]) == 1
            if manifest["subjects"] == [subject]:
                reference = manifest["roleRef"]
                yield manifest["metadata"].get("namespace"), reference["kind"], reference["name"]


def test_rights_over_the_whole_cluster(render: Any, find: Any) -> None:
    assert granted(find("ClusterRole", "vllm-fleet-operator")["rules"]) == OPERATOR | NODES
    assert granted(find("ClusterRole", "vllm-fleet-gateway")["rules"]) == GATEWAY
    assert find("Role", "vllm-fleet-operator-lease")["rules"] == LEASE
    assert set(bound(render(), "vllm-fleet-operator")) == {
        (None, "ClusterRole", "vllm-fleet-operator"),
        ("vllm-fleet", "Role", "vllm-fleet-operator-lease"),
    }
    assert set(bound(render(), "vllm-fleet-gateway")) == {(None, "ClusterRole", "vllm-fleet-gateway")}
    assert sum(m["kind"] in {"Role", "ClusterRole"} for m in render()) == 3


def test_rights_in_the_watched_namespaces_only(render: Any) -> None:
    manifests = render({"watchNamespaces": ["a", "b"]})
    assert not [m for m in manifests if m["kind"] in CLUSTER_KINDS]
    roles = {
        (m["metadata"]["namespace"], m["metadata"]["name"]): m["rules"]
        for m in manifests
        if m["kind"] == "Role"
    }
    lease = roles.pop(("vllm-fleet", "vllm-fleet-operator-lease"))
    assert lease == LEASE
    assert {key: granted(rules) for key, rules in roles.items()} == {
        (namespace, f"vllm-fleet-{component}"): rights
        for namespace in ("a", "b")
        for component, rights in (("operator", OPERATOR), ("gateway", GATEWAY))
    }
    assert set(bound(manifests, "vllm-fleet-gateway")) == {(n, "Role", "vllm-fleet-gateway") for n in "ab"}


@pytest.mark.parametrize(
    ("release", "config", "name"),
    [
        ("vllm-fleet", {}, "vllm-operator"),
        ("prod", {}, "prod-vllm-fleet-operator"),
        ("prod-vllm-fleet", {}, "prod-vllm-fleet-operator"),
        ("prod", {"lease": {"durationSeconds": 30}}, "prod-vllm-fleet-operator"),
        ("prod", {"lease": {"name": "mine"}}, "mine"),
    ],
)
def test_each_release_has_a_lease_of_its_own(
    render: Any, release: str, config: dict[str, Any], name: str
) -> None:
    manifests = render({"operator": {"config": config}}, helm.Release(name=release))
    (file,) = [m["data"]["operator.yaml"] for m in manifests if "operator.yaml" in m.get("data", {})]
    assert yaml.safe_load(file)["lease"] == config.get("lease", {}) | {"name": name}
    (role,) = [m for m in manifests if m["metadata"]["name"].endswith("-operator-lease") and "rules" in m]
    assert [name] in [rule.get("resourceNames") for rule in role["rules"] if rule["resources"] == ["leases"]]


def test_without_engine_keys_no_right_on_secrets(render: Any, find: Any) -> None:
    values = {"engineKeys": {"enabled": False}}
    assert ("", "secrets") not in granted(find("ClusterRole", "vllm-fleet-operator", values)["rules"])
    assert find("Role", "vllm-fleet-operator-lease", values)["rules"] == LEASE[:2]


def test_secrets_only_where_asked_for(render: Any, find: Any) -> None:
    values = {"operator": {"config": {"secretAccess": True}}}
    assert granted(find("ClusterRole", "vllm-fleet-operator", values)["rules"]) == OPERATOR | NODES | SECRETS
    namespaced = find("Role", "vllm-fleet-operator", values | {"watchNamespaces": ["a"]})
    assert granted(namespaced["rules"]) == OPERATOR | SECRETS


def test_the_lease_right_follows_the_lease_name(find: Any) -> None:
    values = {"operator": {"config": {"lease": {"name": "mine"}}}}
    assert find("Role", "vllm-fleet-operator-lease", values)["rules"][1]["resourceNames"] == ["mine"]


def test_roles_are_bound_to_the_account_that_the_pods_run_as(render: Any, pods: Any) -> None:
    values = {"gateway": {"serviceAccount": {"create": False, "name": "mine"}}}
    assert dict(pods(values))["vllm-fleet-gateway"]["spec"]["serviceAccountName"] == "mine"
    assert list(bound(render(values), "mine")) == [(None, "ClusterRole", "vllm-fleet-gateway")]
    accounts = {m["metadata"]["name"] for m in render(values) if m["kind"] == "ServiceAccount"}
    assert accounts == {"vllm-fleet-operator"}


def breaches(pod: dict[str, Any]) -> Iterator[str]:
    """How a pod spec breaks Pod Security "restricted" (https://kubernetes.io/docs/concepts/security/pod-security-standards/)."""
    shared = pod.get("securityContext", {})
    if {"hostNetwork", "hostPID", "hostIPC"} & {key for key, value in pod.items() if value}:
        yield "host namespaces"
    volumes = {kind for volume in pod.get("volumes", ()) for kind in volume.keys() - {"name"}}
    if volumes - {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"}:
        yield "volume types"
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        own = container.get("securityContext", {})
        context = shared | own
        yield from (f"{container['name']}: {rule}" for rule in _container_breaches(context))
        if any("hostPort" in port for port in container.get("ports", ())):
            yield "host ports"


def _container_breaches(context: dict[str, Any]) -> Iterator[str]:
    capabilities = context.get("capabilities", {})
    if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
        yield "privilege escalation"
    if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "root"
    if context.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "seccomp"


def test_the_test_pod_passes_restricted_as_well(find: Any) -> None:
    spec = find("Pod", "vllm-fleet-test")["spec"]
    assert list(breaches(spec)) == []
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_pods_pass_restricted_on_a_read_only_root(pods: Any) -> None:
    for name, template in pods():
        pod = template["spec"]
        assert list(breaches(pod)) == [], name
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (65532, 65532)
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("path", "value", "breach"),
    [
        (("hostNetwork",), True, "host namespaces"),
        (("volumes", 0), {"name": "h", "hostPath": {"path": "/"}}, "volume types"),
        (("containers", 0, "ports", 0, "hostPort"), 80, "host ports"),
        (("containers", 0, "securityContext", "privileged"), True, "privilege escalation"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "privilege escalation"),
        (
            ("containers", 0, "securityContext", "capabilities"),
            {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
            "capabilities",
        ),
        (("containers", 0, "securityContext", "capabilities"), {}, "capabilities"),
        (("containers", 0, "securityContext", "runAsUser"), 0, "root"),
        (("securityContext", "runAsNonRoot"), False, "root"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccomp"),
    ],
)
def test_the_check_finds_each_breach(pods: Any, path: tuple[Any, ...], value: Any, breach: str) -> None:
    pod = copy.deepcopy(dict(pods())["vllm-fleet-gateway"]["spec"])
    *parents, last = path
    node: Any = pod
    for key in parents:
        node = node[key]
    node[last] = value
    assert any(breach in found for found in breaches(pod))
