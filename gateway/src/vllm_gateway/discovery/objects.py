"""From VLLMModels and EndpointSlices, as the API gives them, to models of the table. Pure.

The contract with the operator: docs/architecture.md. A slice counts only if the endpointslice controller
made it for the Service of that very VLLMModel (by uid), and its targets are Pods: whoever may create a
Service or a slice in a namespace cannot take over a model's requests by its labels alone.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from vllm_gateway.routing.table import Endpoint, Limits, Model
from vllm_gateway.settings import Routing, parse_duration

Json = dict[str, Any]
Keys = tuple[str | None, str | None]
KeysOf = Callable[[str, str, str], Keys]

LABEL_UID = "vllm-fleet.dev/model-uid"
LABEL_SERVICE = "kubernetes.io/service-name"
LABEL_MANAGER = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
PORT_NAME = "http"
_DEFAULT_WEIGHT = 100
_COLD_START = 600.0  # spec.autoscaling.coldStartTimeout's default
# Reasons of the Ready condition with which an endpoint comes by itself. It may still tell of the pod before,
# whose endpoint has gone: Serving and RollingOut.
STARTING = frozenset({"Starting", "Pulling", "Downloading", "Loading", "Draining", "RollingOut", "Serving"})
_ROUTINGS: dict[str, Routing] = {name: name for name in get_args(Routing)}


def no_keys(_namespace: str, _name: str, _uid: str) -> Keys:
    """For engines that ask for no key."""
    return None, None


@dataclass(frozen=True, slots=True)
class _Built:
    """A model, and all that it was made of: objects as the API gave them, which nobody changes."""

    body: Json
    slices: tuple[Json, ...]
    keys: Keys
    model: Model


class Models:
    """One `Model` for each VLLMModel, with the endpoints that its slices make ready.

    Of a thousand models a change concerns few, and streams wait while the others are built: those are kept.
    """

    def __init__(self) -> None:
        self._built: dict[str, _Built] = {}

    def of(self, models: Iterable[Json], slices: Iterable[Json], keys_of: KeysOf = no_keys) -> list[Model]:
        """`keys_of(namespace, name, uid)` is the key that the model's engines ask for, and the one before."""
        by_service: dict[tuple[str, str], list[Json]] = {}
        for item in slices:
            metadata = _mapping(item.get("metadata"))
            service = _mapping(metadata.get("labels")).get(LABEL_SERVICE, "")
            by_service.setdefault((str(metadata.get("namespace", "")), str(service)), []).append(item)
        built = [self._one(body, by_service, keys_of) for body in models]
        self._built = {one.model.key: one for one in built}
        return [one.model for one in built]

    def _one(self, body: Json, by_service: dict[tuple[str, str], list[Json]], keys_of: KeysOf) -> _Built:
        metadata = _mapping(body.get("metadata"))
        namespace, name, uid = (str(metadata.get(field, "")) for field in ("namespace", "name", "uid"))
        slices = tuple(by_service.get((namespace, f"{name}-engine"), ()))
        keys = keys_of(namespace, name, uid)
        known = self._built.get(f"{namespace}/{name}")
        if known is not None and known.body is body and known.keys == keys and _same(known.slices, slices):
            return known
        own = [item for item in slices if _belongs(item, uid)]
        endpoints = tuple({end.id: end for item in own for end in _endpoints(item, keys)}.values())
        return _Built(body, slices, keys, _model(body, endpoints))


def models_of(models: Iterable[Json], slices: Iterable[Json], keys_of: KeysOf = no_keys) -> list[Model]:
    """The same, once."""
    return Models().of(models, slices, keys_of)


def _same(ones: tuple[Json, ...], others: tuple[Json, ...]) -> bool:
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def _model(body: Json, endpoints: tuple[Endpoint, ...]) -> Model:
    metadata, status = _mapping(body.get("metadata")), _mapping(body.get("status"))
    spec = _mapping(body.get("spec"))
    gateway = _mapping(spec.get("gateway"))
    name, namespace = str(metadata.get("name", "")), str(metadata.get("namespace", ""))
    reason, message = ("", "") if endpoints else _why_not(status)
    weight = _number(gateway.get("weight"))
    adapters = tuple(str(item["name"]) for item in spec.get("adapters") or () if _mapping(item).get("name"))
    granted = {str(name) for name in status.get("adapters") or ()}
    return Model(
        name=name,
        upstream_name=name,
        namespace=namespace,
        served_names=tuple(str(name) for name in status.get("servedNames") or ()),
        endpoints=endpoints,
        reason=reason,
        message=message,
        stalled=not endpoints and _condition(status, "Stalled").get("status") == "True",
        starting=not endpoints and _condition(status, "Ready").get("reason") in STARTING,
        created=_timestamp(metadata.get("creationTimestamp")),
        weight=_DEFAULT_WEIGHT if weight is None else weight,
        limits=_limits(gateway, _mapping(spec.get("autoscaling"))),
        revision=str(_mapping(status.get("lastServed")).get("template", "")),
        routing=_ROUTINGS.get(str(gateway.get("routing"))),
        adapters=adapters,
        granted_adapters=tuple(name for name in adapters if name in granted),
    )


def _limits(gateway: Json, autoscaling: Json) -> Limits:
    cold_start = _seconds(autoscaling.get("coldStartTimeout")) or _COLD_START
    cache = _mapping(gateway.get("responseCache"))
    return Limits(
        first_token=_seconds(gateway.get("firstTokenTimeout")) or None,
        idle=_seconds(gateway.get("idleTimeout")) or None,
        max_in_flight=_number(gateway.get("maxInFlight")) or None,
        max_queue=_number(gateway.get("maxQueue")),
        queue_timeout=_seconds(gateway.get("queueTimeout")),
        cold_start=cold_start if autoscaling else None,
        cache_ttl=_seconds(cache.get("ttl")),
    )


def _belongs(item: Json, uid: str) -> bool:
    metadata = _mapping(item.get("metadata"))
    labels = _mapping(metadata.get("labels"))
    owners = metadata.get("ownerReferences") or ()
    of_service = any(owner.get("kind") == "Service" and owner.get("controller") is True for owner in owners)
    return of_service and labels.get(LABEL_MANAGER) == MANAGER and bool(uid) and labels.get(LABEL_UID) == uid


def _endpoints(item: Json, keys: Keys) -> Iterator[Endpoint]:
    key, former = keys
    port = next(
        (entry.get("port") for entry in item.get("ports") or () if entry.get("name") == PORT_NAME), None
    )
    for entry in item.get("endpoints") or ():
        target = _mapping(entry.get("targetRef"))
        addresses = entry.get("addresses") or ()
        if port and addresses and target.get("kind") == "Pod" and _ready(_mapping(entry.get("conditions"))):
            name, host = str(target.get("uid") or addresses[0]), str(addresses[0])
            yield Endpoint(name, host, int(port), key=key, former_key=former)


def _ready(conditions: Json) -> bool:
    """Kubernetes says to read an unset `ready` as true, an unset `terminating` as false."""
    return conditions.get("ready") is not False and conditions.get("terminating") is not True


def _why_not(status: Json) -> tuple[str, str]:
    ready = _condition(status, "Ready")
    if ready and ready.get("status") != "True":
        return str(ready.get("reason", "")), str(ready.get("message", ""))
    if not status:
        return "Pending", "the operator has not seen this model yet"
    return "NoEndpoints", "no pod of this model is ready"


def _condition(status: Json, kind: str) -> Json:
    found = (item for item in status.get("conditions") or () if item.get("type") == kind)
    return next(found, {})


# The API server's schema lets no other values through; a bad one is as good as none.


def _seconds(value: object) -> float | None:
    try:
        return parse_duration(value) if value is not None else None
    except ValueError:
        return None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _timestamp(value: object) -> int:
    try:
        return int(datetime.datetime.fromisoformat(str(value)).timestamp())
    except ValueError:
        return 0


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}
