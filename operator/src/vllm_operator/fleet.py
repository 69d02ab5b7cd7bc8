"""All models, and which of them holds a short name, its own or an adapter's.

Models of one namespace share a name; between namespaces the oldest model's namespace holds it, ties broken
by namespace and name. Only metadata and the names asked for or granted are looked at: an invalid model keeps
its names, and a name passes on when the status of who had it no longer grants it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from vllm_operator.kinds import Body, uid_of, version_of, without_managed_fields
from vllm_operator.names import ModelKey


def asked_names(body: Body) -> tuple[str, ...]:
    """All short names of a model as it stands in the cluster, valid or not: its own, then its adapters'."""
    return (*dict.fromkeys((*own_names(body), *adapter_names(body))),)


def adapter_names(body: Body) -> tuple[str, ...]:
    adapters = (body.get("spec") or {}).get("adapters")
    found = (
        [item.get("name") for item in adapters if isinstance(item, dict)]
        if isinstance(adapters, list)
        else []
    )
    return tuple(name for name in found if isinstance(name, str))


def own_names(body: Body) -> tuple[str, ...]:
    asked = (body.get("spec") or {}).get("servedNames")
    if isinstance(asked, list) and asked and all(isinstance(name, str) for name in asked):
        return tuple(asked)
    return (body["metadata"]["name"],)


def claimed_names(body: Body) -> set[str]:
    """Asked for, or still held by the status: an edit that is refused keeps the names that are served."""
    return {*asked_names(body), *_in_status(body, "servedNames"), *_in_status(body, "adapters")}


def _in_status(body: Body, field: str) -> tuple[str, ...]:
    status = body.get("status")
    held = status.get(field) if isinstance(status, dict) else None
    return tuple(name for name in held or () if isinstance(name, str))


class Fleet:
    def __init__(self) -> None:
        self.models: dict[ModelKey, Body] = {}
        self._claims: dict[str, set[ModelKey]] = defaultdict(set)

    def put(self, body: Body) -> set[ModelKey] | None:
        """Takes in a model's newest state. Returns the keys that it concerns, or None if it was known."""
        key = ModelKey(body["metadata"].get("namespace", ""), body["metadata"]["name"])
        old = self.models.get(key)
        if old is not None and uid_of(old) == uid_of(body) and version_of(old) >= version_of(body):
            return None
        body, concerned = without_managed_fields(body), {key}
        if old is None or claimed_names(old) != claimed_names(body) or uid_of(old) != uid_of(body):
            concerned |= self._unclaim(key)
            self.models[key] = body
            concerned |= self._claim(key, body)
        self.models[key] = body
        return concerned

    def remove(self, key: ModelKey, uid: str = "") -> set[ModelKey]:
        """Returns the keys that it concerns. With a uid, only that very object is removed."""
        body = self.models.get(key)
        if body is None or uid not in ("", uid_of(body)):
            return set()
        concerned = {key} | self._unclaim(key)
        del self.models[key]
        return concerned

    def replace(self, bodies: list[Body], version: int) -> set[ModelKey]:
        """Takes in a complete list: what is missing from it and not younger is removed.

        Returns the keys that it concerns.
        """
        present = {ModelKey(body["metadata"]["namespace"], body["metadata"]["name"]) for body in bodies}
        concerned: set[ModelKey] = set()
        for key, body in list(self.models.items()):
            if key not in present and version_of(body) <= version:
                concerned |= self.remove(key)
        for body in bodies:
            concerned |= self.put(body) or set()
        return concerned

    def granted(self, key: ModelKey) -> tuple[str, ...]:
        """The model's own names, those that are held elsewhere left out."""
        return self._held(key, own_names(self.models[key]))

    def granted_adapters(self, key: ModelKey) -> tuple[str, ...]:
        return self._held(key, adapter_names(self.models[key]))

    def _held(self, key: ModelKey, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in wanted if self.holder(name)[0] == key.namespace)

    def kept(self, key: ModelKey) -> tuple[str, ...]:
        """Of the names that the status grants, those that are still this namespace's."""
        return self._held(key, _in_status(self.models[key], "servedNames"))

    def kept_adapters(self, key: ModelKey) -> tuple[str, ...]:
        return self._held(key, _in_status(self.models[key], "adapters"))

    def denied(self, key: ModelKey) -> Iterator[tuple[str, ModelKey]]:
        """The names that the model asked for and does not get, each with the oldest model that holds it."""
        for name in asked_names(self.models[key]):
            if (holder := self.holder(name))[0] != key.namespace:
                yield name, holder

    def holder(self, name: str) -> ModelKey:
        """The oldest model that claims the name; KeyError if none does."""
        claims = self._claims.get(name)
        if not claims:
            raise KeyError(name)
        return min(claims, key=lambda key: (self.models[key]["metadata"].get("creationTimestamp", ""), *key))

    def _claim(self, key: ModelKey, body: Body) -> set[ModelKey]:
        names = claimed_names(body)
        for name in names:
            self._claims[name].add(key)
        return {other for name in names for other in self._claims[name]}

    def _unclaim(self, key: ModelKey) -> set[ModelKey]:
        concerned: set[ModelKey] = set()
        for name in claimed_names(self.models[key]) if key in self.models else ():
            self._claims[name].discard(key)
            concerned |= self._claims[name]
            if not self._claims[name]:
                del self._claims[name]
        return concerned
