"""How many requests a client sends, by kind of request, as the API server itself counts them.

Its request metrics have no label for the client. Its priority and fairness metrics have one for the
FlowSchema, and a FlowSchema may match one service account and some verbs: so each kind of request of each
client gets one, on the level `workload-low`, where service accounts' requests are served anyway.
https://kubernetes.io/docs/concepts/cluster-administration/flow-control/
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

API_VERSION = "flowcontrol.apiserver.k8s.io/v1"
PRECEDENCE = 500  # before that of all service accounts, 9000
_CPU = re.compile(r"^process_cpu_seconds_total (\S+)$", re.MULTILINE)
_DISPATCHED = re.compile(
    r'^apiserver_flowcontrol_dispatched_requests_total\{flow_schema="([^"]*)".*\} (\S+)$'
)


@dataclass(frozen=True)
class Client:
    """A service account, and the kind whose status it writes."""

    name: str
    namespace: str
    account: str
    group: str = ""
    plural: str = ""


@dataclass(frozen=True)
class Flow:
    name: str
    verbs: tuple[str, ...]
    group: str = "*"
    resource: str = "*"


READS = ("get", "list", "watch")
WRITES = ("create", "apply", "update", "delete", "status", "event")


def flows(client: Client) -> tuple[Flow, ...]:
    """The first that matches a request counts it."""
    own = f"{client.plural}/status" if client.plural else "none"
    return (
        Flow("lease", ("*",), "coordination.k8s.io", "leases"),
        Flow("event", ("create", "update", "patch"), "*", "events"),
        Flow("status", ("update", "patch"), client.group or "none", own),
        Flow("create", ("create",)),
        Flow("apply", ("patch",)),
        Flow("update", ("update",)),
        Flow("delete", ("delete", "deletecollection")),
        *(Flow(verb, (verb,)) for verb in READS),
    )


def schema_name(client: Client, flow: str) -> str:
    return f"bench-{client.name}-{flow}"


def flow_schemas(client: Client) -> list[dict[str, Any]]:
    account = {"name": client.account, "namespace": client.namespace}
    return [
        _schema(schema_name(client, flow.name), PRECEDENCE + number, account, flow)
        for number, flow in enumerate(flows(client))
    ]


def _schema(name: str, precedence: int, account: dict[str, str], flow: Flow) -> dict[str, Any]:
    resources = {
        "verbs": list(flow.verbs),
        "apiGroups": [flow.group],
        "resources": [flow.resource],
        "namespaces": ["*"],
        "clusterScope": True,
    }
    subjects = [{"kind": "ServiceAccount", "serviceAccount": account}]
    return {
        "apiVersion": API_VERSION,
        "kind": "FlowSchema",
        "metadata": {"name": name},
        "spec": {
            "matchingPrecedence": precedence,
            "priorityLevelConfiguration": {"name": "workload-low"},
            "distinguisherMethod": {"type": "ByUser"},
            "rules": [{"subjects": subjects, "resourceRules": [resources]}],
        },
    }


def requests_of(client: Client, metrics: str) -> Counter[str]:
    """The client's requests so far, by flow, from the text of the API server's /metrics."""
    names = {schema_name(client, flow.name): flow.name for flow in flows(client)}
    found: Counter[str] = Counter()
    for line in metrics.splitlines():
        if (match := _DISPATCHED.match(line)) and match[1] in names:
            found[names[match[1]]] += int(float(match[2]))
    return found


def server_cpu_seconds(metrics: str) -> float:
    """What the API server has burnt so far, for all its clients."""
    found = _CPU.search(metrics)
    return float(found[1]) if found else 0.0


def writes(requests: Counter[str]) -> int:
    """All that change something, but for the Lease, which is written by the clock."""
    return sum(requests[name] for name in WRITES)


def children_writes(requests: Counter[str]) -> int:
    return sum(requests[name] for name in ("create", "apply", "update", "delete"))


def per_model(requests: Counter[str], models: int) -> float:
    """Requests of all kinds but the Lease's, for one model."""
    return (sum(requests.values()) - requests["lease"]) / models
