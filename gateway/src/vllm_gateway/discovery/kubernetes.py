"""Models from a Kubernetes API: mirrors VLLMModels and EndpointSlices and builds the table from them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from vllm_gateway import __version__, tasks
from vllm_gateway.discovery.engine_keys import MasterKey
from vllm_gateway.discovery.objects import LABEL_MANAGER, MANAGER, Models
from vllm_gateway.discovery.reflector import ApiError, Json, Reflector
from vllm_gateway.discovery.source import TableHolder
from vllm_gateway.routing.table import Table
from vllm_gateway.settings import BadSettings

_LOG = logging.getLogger("vllm_gateway.discovery")
_MODELS = "/apis/vllm-fleet.dev/v1alpha1{scope}/vllmmodels"
_SLICES = "/apis/discovery.k8s.io/v1{scope}/endpointslices"
_OWN_SLICES = {"labelSelector": f"{LABEL_MANAGER}={MANAGER},vllm-fleet.dev/model"}
_LIST_TIMEOUT = 30.0
_SILENCE = 90.0  # a watch brings a bookmark a minute
_GATHER_SECONDS = 0.02


class KubeApi:
    """Reads through the official client, as plain JSON: its typed models would cost more than they tell."""

    def __init__(self) -> None:
        self._client: ApiClient | None = None

    async def get(self, path: str, query: Mapping[str, str]) -> Json:
        response = await self._request(path, query, aiohttp.ClientTimeout(total=_LIST_TIMEOUT))
        try:
            document: Json = json.loads(await response.read())
        except (OSError, TimeoutError, aiohttp.ClientError, ValueError) as error:
            raise ApiError(0, f"the Kubernetes API broke off: {_words(error)}") from error
        return document

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        patience = aiohttp.ClientTimeout(total=None, sock_connect=_LIST_TIMEOUT, sock_read=_SILENCE)
        response = await self._request(path, query, patience)
        try:
            async for line in response.content:
                yield json.loads(line)
        except TimeoutError as error:
            raise ApiError(0, f"the Kubernetes API was silent for {_SILENCE:g} s") from error
        except (OSError, aiohttp.ClientError, HttpProcessingError, ValueError) as error:
            # HttpProcessingError: an event that is longer than aiohttp's buffer
            raise ApiError(0, f"the Kubernetes API broke off: {_words(error)}") from error
        finally:
            response.close()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _request(
        self, path: str, query: Mapping[str, str], patience: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        try:
            client = await self._connected()
            call = await client.param_serialize(
                "GET", path, query_params=list(query.items()), auth_settings=["BearerToken"]
            )
            answer = await client.call_api(*call, _request_timeout=patience)
            response: aiohttp.ClientResponse = answer.response
            if response.status != 200:
                raise _refused(response.status, path, await response.read())
        except (OSError, TimeoutError, aiohttp.ClientError, config.ConfigException) as error:
            raise ApiError(0, f"the Kubernetes API does not answer: {_words(error)}") from error
        return response

    async def _connected(self) -> ApiClient:
        if self._client is None:
            configuration = Configuration()
            if _in_cluster():
                config.load_incluster_config(client_configuration=configuration)
            else:
                # By name, since the client reads the variable only once, when it is imported.
                await config.load_kube_config(
                    os.environ.get("KUBECONFIG"), client_configuration=configuration
                )
            self._client = ApiClient(configuration)
            self._client.user_agent = f"vllm-gateway/{__version__}"
        return self._client


class KubernetesSource:
    """Two reflectors a namespace, or two for the whole cluster; a change of any rebuilds the whole table."""

    def __init__(
        self, holder: TableHolder, namespaces: Sequence[str], master: MasterKey | None = None
    ) -> None:
        if not _in_cluster() and not _has_kubeconfig():
            raise BadSettings(
                "no models to serve: set VLLM_URL or `backends:` for static backends, or run in a cluster or "
                "with a KUBECONFIG"
            )
        self._holder = holder
        self._master = master or MasterKey(None)
        self._api = KubeApi()
        self._built = Models()
        self._news = asyncio.Event()
        scopes = [f"/namespaces/{namespace}" for namespace in namespaces] or [""]
        self._models = [self._reflect(_MODELS.format(scope=scope), {}) for scope in scopes]
        self._slices = [self._reflect(_SLICES.format(scope=scope), _OWN_SLICES) for scope in scopes]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Does not wait for the API: a gateway that starts while it is down says so and heals."""
        self._tasks = [
            *(tasks.start(reflector.path, reflector.run) for reflector in (*self._models, *self._slices)),
            tasks.start("table", self._publish_changes),
            tasks.start("master key", lambda: self._master.follow(self._news.set)),
        ]

    async def stop(self) -> None:
        await tasks.stop(self._tasks)
        await self._api.close()

    def age(self) -> float:
        heard = min(reflector.heard_at for reflector in (*self._models, *self._slices))
        return time.monotonic() - heard

    def _reflect(self, path: str, query: Mapping[str, str]) -> Reflector:
        return Reflector(self._api, path, self._news.set, query=query)

    async def _publish_changes(self) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(_GATHER_SECONDS)  # a rollout changes many objects at once
            self._news.clear()
            try:
                self._publish()
            except Exception:  # noqa: BLE001 - the next change is to be tried, or nobody would hear of it
                _LOG.exception("the table was not changed")

    def _publish(self) -> None:
        table = self._build()
        if table != self._holder():
            self._holder.put(table)

    def _build(self) -> Table:
        reflectors = (*self._models, *self._slices)
        bodies = [item for reflector in self._models for item in reflector.items.values()]
        slices = [item for reflector in self._slices for item in reflector.items.values()]
        problems = (self._master.problem, *(reflector.problem for reflector in reflectors))
        notes = dict.fromkeys(filter(None, problems))
        complete = all(reflector.synced for reflector in reflectors)
        models = self._built.of(bodies, slices, self._master.both)
        return Table.of(models, complete=complete, notes=notes)


def _in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ


def _has_kubeconfig() -> bool:
    files = os.environ.get("KUBECONFIG", str(Path.home() / ".kube" / "config")).split(os.pathsep)
    return any(Path(file).is_file() for file in files if file)


def _refused(status: int, path: str, body: bytes) -> ApiError:
    what = path.rsplit("/", 1)[-1]
    if status == 404:
        return ApiError(404, f"the cluster does not know {what}: is the chart's CRD installed?")
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, LookupError, TypeError):
        message = f"status {status}"
    return ApiError(status, f"the Kubernetes API refuses {what}: {message}")


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
