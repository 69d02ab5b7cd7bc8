"""Who the operator and the bare loop are for the API server: service accounts with the chart's own rights."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from flows import Client, flow_schemas, requests_of, server_cpu_seconds
from kubernetes.aio.client import ApiClient
from programs import BenchError

from vllm_operator.cluster import Cluster
from vllm_operator.errors import Conflict, NotFound
from vllm_operator.kinds import Body, Kind, key_of

PLURALS = {
    "Namespace": "namespaces",
    "CustomResourceDefinition": "customresourcedefinitions",
    "ConfigMap": "configmaps",
    "ServiceAccount": "serviceaccounts",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "FlowSchema": "flowschemas",
    "RuntimeClass": "runtimeclasses",
}
IN_A_NAMESPACE = ("ConfigMap", "Role", "RoleBinding", "ServiceAccount")
TOKEN_SECONDS = 6 * 3600
DELETION_SECONDS = 120


def kind_of(body: Body) -> Kind:
    namespaced = body["metadata"].get("namespace") is not None
    return Kind(body["apiVersion"], body["kind"], PLURALS[body["kind"]], namespaced)


def prerequisites(manifests: Path, component: str) -> list[Body]:
    """The definitions, accounts, rights and settings in a file of manifests; nothing that runs."""
    found = [body for body in yaml.safe_load_all(manifests.read_text()) if body]
    wanted = {None, "crd", component}
    return [
        body
        for body in found
        if body["kind"] in PLURALS
        and (body["metadata"].get("labels") or {}).get("app.kubernetes.io/component") in wanted
    ]


def installed(files: Iterable[Path], namespace: str) -> list[Body]:
    """What `prerequisites` finds, but in other projects' files: without our labels, put in `namespace`."""
    made = [namespace_body(namespace)]
    for file in files:
        for body in yaml.safe_load_all(file.read_text()):
            if body and body.get("kind") in PLURALS:
                if body["kind"] in IN_A_NAMESPACE:
                    body["metadata"]["namespace"] = namespace
                made.append(body)
    return made


class Access:
    """`client` is that of a cluster administrator. What it makes is remembered and removed by `close`."""

    def __init__(self, client: ApiClient, folder: Path) -> None:
        self.cluster = Cluster(client)
        self._client, self._folder = client, folder
        self._made: list[Body] = []

    async def ensure(self, bodies: Iterable[Body]) -> None:
        """What is there already is left as it is, and stays; what an earlier run deleted is waited for."""
        for body in bodies:
            async with asyncio.timeout(DELETION_SECONDS):
                while True:
                    if await self._make(body):
                        break
                    await asyncio.sleep(0.5)

    async def _make(self, body: Body) -> bool:
        kind = kind_of(body)
        try:
            self._made.append(await self.cluster.create(kind, body))
        except Conflict:
            with contextlib.suppress(NotFound):
                there = await self.cluster.get(kind, key_of(body))
                return "deletionTimestamp" not in there["metadata"]
            return False
        return True

    async def refuse_if_installed(self) -> None:
        """Two operators would share the lease and the work."""
        deployments = Kind("apps/v1", "Deployment", "deployments")
        selector = "app.kubernetes.io/part-of=vllm-fleet,app.kubernetes.io/component=operator"
        if (await self.cluster.list(deployments, "", selector)).items:
            raise BenchError("the cluster runs a vllm-operator already: take another one for the bench")

    async def kubeconfig(self, client: Client) -> Path:
        """A file with a token of the client's service account."""
        token_kind = Kind("v1", "TokenRequest", f"serviceaccounts/{client.account}/token")
        order = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "metadata": {"namespace": client.namespace, "name": client.account},
            "spec": {"expirationSeconds": TOKEN_SECONDS},
        }
        token = (await self.cluster.create(token_kind, order))["status"]["token"]
        path = self._folder / f"{client.name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(self._kubeconfig(token)))
        return path

    def _kubeconfig(self, token: str) -> dict[str, Any]:
        settings = self._client.configuration
        server = {"server": settings.host, "certificate-authority": settings.ssl_ca_cert}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": server}],
            "users": [{"name": "bench", "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "current-context": "bench",
        }

    async def count(self, clients: Iterable[Client]) -> None:
        await self.ensure(schema for client in clients for schema in flow_schemas(client))

    async def usage(self, client: Client) -> tuple[Counter[str], float]:
        """So far: the client's requests by flow, and the API server's own CPU seconds for all its work."""
        metrics = (await self._get("/metrics")).decode()
        return requests_of(client, metrics), server_cpu_seconds(metrics)

    async def version(self) -> str:
        return str(json.loads(await self._get("/version"))["gitVersion"])

    async def _get(self, path: str) -> bytes:
        prepared = await self._client.param_serialize("GET", path, auth_settings=["BearerToken"])
        answer = await self._client.call_api(*prepared)
        content: bytes = await answer.response.read()
        return content

    async def close(self) -> None:
        for body in reversed(self._made):
            await self.cluster.delete(kind_of(body), key_of(body), uid=body["metadata"]["uid"])


def namespace_body(name: str) -> Body:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def bare_client_bodies(client: Client, role: str) -> list[Body]:
    """The bare loop's account, with the rights of a cluster role in its namespace."""
    metadata = {"name": client.account, "namespace": client.namespace}
    subject = {"kind": "ServiceAccount", "name": client.account, "namespace": client.namespace}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "subjects": [subject],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        },
    ]
