"""What a stranger inside the cluster can do, on the real one: as little as possible.

Proves: an engine asks for its key, the gateway has it, and the pod holds no more than a reference to it; the
service accounts may do what this list says and no more, by the API server's own word; our namespace takes no
pod that is not restricted.
"""

from __future__ import annotations

import json
from typing import Any

import cluster
import httpx
import pytest

READ = {"get", "list", "watch"}
CHILD = READ | {"create", "patch", "delete"}
OPERATOR = {
    "vllmmodels.vllm-fleet.dev": READ,
    "vllmmodels.vllm-fleet.dev/status": {"patch"},
    "deployments.apps": CHILD,
    "services": CHILD,
    "leaderworkersets.leaderworkerset.x-k8s.io": CHILD,
    "jobs.batch": CHILD,
    "persistentvolumeclaims": CHILD - {"delete"},
    "networkpolicies.networking.k8s.io": CHILD,
    "poddisruptionbudgets.policy": CHILD,
    "pods": READ,
    "events": {"list", "watch", "create"},
    "horizontalpodautoscalers.autoscaling": {"list", "watch"},
    "secrets": {"create"},
    "nodes": READ,
}
OWN_NAMESPACE = {
    "leases.coordination.k8s.io": {"create"},
    "leases.coordination.k8s.io (vllm-operator)": {"get", "update"},
    "secrets (vllm-fleet-engine-keys)": {"get"},
}
GATEWAY = {"vllmmodels.vllm-fleet.dev": READ, "endpointslices.discovery.k8s.io": READ}


def rights(account: str, namespace: str) -> dict[str, set[str]]:
    """What the API server says that a service account of the release may do in a namespace."""
    user = f"system:serviceaccount:{cluster.SYSTEM_NAMESPACE}:{account}"
    groups = ("system:serviceaccounts", "system:authenticated")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    flags = [f"--as={user}", *(f"--as-group={group}" for group in groups)]
    create = ("create", "--validate=false", "-f", "-", "-o", "json")
    answer = json.loads(cluster.kubectl(*flags, *create, stdin=json.dumps(review)))
    found: dict[str, set[str]] = {}
    for rule in answer["status"]["resourceRules"]:
        for name in names_of(rule):
            found.setdefault(name, set()).update(rule["verbs"])
    return found


def names_of(rule: dict[str, Any]) -> list[str]:
    """`resource.group/subresource`, and the objects' names where the rule is for those alone."""
    only = f" ({', '.join(rule['resourceNames'])})" if rule.get("resourceNames") else ""
    made = []
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            plural, _, sub = resource.partition("/")
            made.append(f"{plural}{f'.{group}' if group else ''}{f'/{sub}' if sub else ''}{only}")
    return made


@pytest.mark.parametrize(
    ("account", "namespace", "wanted"),
    [
        ("vllm-fleet-operator", "default", OPERATOR),
        ("vllm-fleet-operator", cluster.SYSTEM_NAMESPACE, OPERATOR | OWN_NAMESPACE),
        ("vllm-fleet-gateway", "default", GATEWAY),
        ("vllm-fleet-gateway", cluster.SYSTEM_NAMESPACE, GATEWAY),
    ],
)
def test_a_service_account_may_do_this_and_no_more(
    smollm2: str, account: str, namespace: str, wanted: dict[str, set[str]]
) -> None:
    anyones = rights("account-without-a-role", namespace)
    own = {name: verbs for name, verbs in rights(account, namespace).items() if anyones.get(name) != verbs}
    assert own == wanted


def test_an_engine_asks_for_its_key_and_the_gateway_has_it(gateway: int, smollm2: str) -> None:
    (pod,) = cluster.engine_pods(smollm2)
    path = f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}:8000/proxy"
    refused = cluster.run(cluster.tool("kubectl"), "get", "--raw", f"{path}/v1/models", check=False)
    assert refused.returncode != 0
    assert "has asked for the client to provide credentials" in refused.stderr  # kubectl's words for a 401
    assert "vllm:" in cluster.kubectl("get", "--raw", f"{path}/metrics")
    body = {"message": "Say hello.", "max_tokens": 4}
    assert httpx.post(f"http://127.0.0.1:{gateway}/chat", json=body, timeout=60).status_code == 200


def test_the_key_stands_in_the_pod_by_reference_only(smollm2: str) -> None:
    (pod,) = cluster.engine_pods(smollm2)
    variables = {item["name"]: item for item in pod["spec"]["containers"][0]["env"]}
    reference = variables["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]
    secret = cluster.get("secret", reference["name"])
    assert secret
    assert secret["immutable"] is True
    (owner,) = secret["metadata"]["ownerReferences"]
    assert owner["name"] == smollm2
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume or "secret" in volume]


def test_our_namespace_takes_no_privileged_pod(release: None) -> None:
    """So what runs there keeps Pod Security's level "restricted": the label is read, and not only written."""
    container = {"name": "c", "image": "x", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    command = (
        cluster.tool("kubectl"),
        "-n",
        cluster.SYSTEM_NAMESPACE,
        "create",
        "--dry-run=server",
        "-f",
        "-",
    )
    refused = cluster.run(*command, stdin=json.dumps(pod), check=False)
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted' in refused.stderr
