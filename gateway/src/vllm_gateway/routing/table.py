"""The routing table: immutable, built whole by discovery, swapped whole, read without a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from vllm_gateway.errors import (
    GatewayError,
    model_not_allowed,
    model_not_found,
    model_not_ready,
    model_removed,
)
from vllm_gateway.settings import Routing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine. `id` is the pod's uid, or the URL of a static backend; `prefix` is a URL's path.

    `former_key` is what it asks for in place of `key` until it has been restarted with that.
    """

    id: str
    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    key: str | None = field(default=None, repr=False)
    former_key: str | None = field(default=None, repr=False)

    def __hash__(self) -> int:  # of one string, which keeps its own: each request looks for its connections
        return hash(self.id)


@dataclass(frozen=True, slots=True)
class Limits:
    """A model's own limits, times in seconds; None means the gateway's setting.

    `max_in_flight` is per endpoint. `cold_start` is how long a request waits while there is no endpoint.
    `cache_ttl` of 0 is no response cache.
    """

    first_token: float | None = None
    idle: float | None = None
    max_in_flight: int | None = None
    max_queue: int | None = None
    queue_timeout: float | None = None
    cold_start: float | None = None
    cache_ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model as callers see it, and what the engine calls it (`upstream_name`).

    `reason` and `message` say why there is no endpoint, in the words of the Ready condition; `stalled` that
    time alone will not change it, `starting` that a pod is about to serve, as in a rollout in place.
    `revision` changes with the pods that serve it: another one may answer otherwise. `adapters` are its LoRA
    adapters, `granted_adapters` those whose name works without the model's; `adapter` is set where this is
    the model with one of them (`as_adapter`).
    """

    name: str
    upstream_name: str
    namespace: str = ""
    served_names: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    reason: str = ""
    message: str = ""
    stalled: bool = False
    starting: bool = False
    created: int = 0
    weight: int = 100
    limits: Limits = Limits()
    routing: Routing | None = None
    revision: str = ""
    adapters: tuple[str, ...] = ()
    granted_adapters: tuple[str, ...] = ()
    adapter: str = ""
    key: str = field(init=False, repr=False, compare=False)
    """`<namespace>/<name>`, or the bare name where there are no namespaces (static backends)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.namespace}/{self.name}" if self.namespace else self.name)

    @property
    def public_name(self) -> str:
        """The name that callers know it by: the first short one that was granted, or the key."""
        if self.adapter:
            return self.adapter if self.adapter in self.granted_adapters else self.full_name(self.adapter)
        return next(iter(self.served_names), self.key)

    def full_name(self, adapter: str) -> str:
        """The name that always means this adapter: no name of a model holds a colon."""
        return f"{self.key}:{adapter}"

    def as_adapter(self, name: str) -> Model:
        """The model with one of its adapters; itself for an empty name. Endpoints and metrics are its own."""
        return replace(self, adapter=name, upstream_name=name) if name else self


@dataclass(frozen=True, slots=True)
class Table:
    """Every model by key and by granted name.

    `complete` is false until discovery has seen everything once: an unknown name is then not yet a 404.
    `notes` are sentences for /health about what discovery cannot see now. `hidden` are names that exist but
    not for the caller whose view this is.
    """

    models: Mapping[str, Model] = field(default_factory=lambda: MappingProxyType({}))
    names: Mapping[str, tuple[Model, ...]] = field(default_factory=lambda: MappingProxyType({}))
    complete: bool = False
    notes: tuple[str, ...] = ()
    hidden: frozenset[str] = frozenset()

    @classmethod
    def of(cls, models: Iterable[Model], *, complete: bool = True, notes: Iterable[str] = ()) -> Table:
        """Models of one namespace may share a short name. Between namespaces the operator grants it to one;
        should two hold it for a moment, the oldest model's namespace keeps it.
        """
        by_key = {model.key: model for model in sorted(models, key=lambda model: model.key)}
        names: dict[str, tuple[Model, ...]] = {}
        for model in sorted(by_key.values(), key=lambda model: (model.created, model.key)):
            for name in dict.fromkeys(model.served_names):
                holders = names.get(name, ())
                if not holders or holders[0].namespace == model.namespace:
                    names[name] = (*holders, model)
        taken = frozenset(names)
        for model in sorted(by_key.values(), key=lambda model: (model.created, model.key)):
            for name in dict.fromkeys(model.granted_adapters):
                holders = names.get(name, ())
                if name not in taken and (not holders or holders[0].namespace == model.namespace):
                    names[name] = (*holders, model.as_adapter(name))
            names |= {model.full_name(name): (model.as_adapter(name),) for name in model.adapters}
        names |= {key: (model,) for key, model in by_key.items()}  # a key always wins over a short name
        return cls(MappingProxyType(by_key), MappingProxyType(names), complete, tuple(notes))

    def seen_by(self, may_use: Callable[[Model], bool]) -> Table:
        """The table of a caller who may use some of the models."""
        kept = Table.of(filter(may_use, self.models.values()), complete=self.complete, notes=self.notes)
        return replace(kept, hidden=frozenset(self.names.keys() - kept.names.keys()))

    def resolve(self, name: str) -> tuple[Model, ...]:
        """The models that answer to `name`; more than one share it by weight. Raises 403, 404 or 503."""
        found = self.names.get(name)
        if found is not None:
            return found
        if name in self.hidden:
            raise model_not_allowed(name, self.public_names())
        if not self.complete:
            why = "; ".join(self.notes) or "the gateway has not seen the list of models yet"
            raise model_not_ready(name, "Unknown", why, retry_after=2)
        raise model_not_found(name, self.public_names())

    def now(self, models: Iterable[Model], name: str) -> tuple[Model, ...]:
        """What became of `models`, which an older table gave for `name`. Raises a 404 if all are gone."""
        kept = tuple(
            current.as_adapter(model.adapter)
            for model in models
            if (current := self.models.get(model.key)) is not None
            and (not model.adapter or model.adapter in current.adapters)
        )
        if not kept:
            raise model_removed(name)
        return kept

    def only(self) -> Model | None:
        """The model that a request without a name means: the one there is."""
        return next(iter(self.models.values())) if len(self.models) == 1 else None

    def public_names(self) -> list[str]:
        """One name per way to ask: the short names, and the key of a model that has none."""
        adapters = {model.full_name(name) for model in self.models.values() for name in model.adapters}
        short = [name for name in self.names if name not in self.models and name not in adapters]
        bare = [model.key for model in self.models.values() if not _has_short_name(model)]
        return sorted({*short, *bare, *(name for name in adapters if not self._has_granted(name))})

    def _has_granted(self, full_name: str) -> bool:
        """Whether an adapter can be asked for by its short name too."""
        (model,) = self.names[full_name]
        return any(other.key == model.key and other.adapter for other in self.names.get(model.adapter, ()))


def _has_short_name(model: Model) -> bool:
    return any(name != model.key for name in model.served_names)


def not_ready(name: str, models: Iterable[Model]) -> GatewayError:
    """A 503 in the words of the first of `models` that says why."""
    chosen = next((model for model in models if model.reason or model.message), None)
    return model_not_ready(name, chosen.reason if chosen else "", chosen.message if chosen else "")
