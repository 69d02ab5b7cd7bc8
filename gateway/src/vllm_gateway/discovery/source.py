"""What a source of models is, and the one place that holds the table in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from vllm_gateway.routing.table import Model, Table

_LOG = logging.getLogger("vllm_gateway.discovery")


class Source(Protocol):
    """Keeps a `TableHolder` current from `start` to `stop`."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    def age(self) -> float:
        """Seconds since the source last answered."""
        ...


class TableHolder:
    """The table in force; replaced whole, so that a reader never sees half of a change."""

    def __init__(self) -> None:
        self._table = Table(notes=("the gateway has not seen the list of models yet",))
        self._followers: list[Callable[[Mapping[str, Model]], None]] = []

    def __call__(self) -> Table:
        return self._table

    def tell(self, follower: Callable[[Mapping[str, Model]], None]) -> None:
        """Calls `follower` with the models of each new table, on the request loop."""
        self._followers.append(follower)

    def put(self, table: Table) -> None:
        """Swaps the table; says in the log what changed for callers."""
        before, self._table = self._table, table
        self._log_changes(before, table)
        for follower in self._followers:
            follower(table.models)

    def _log_changes(self, before: Table, after: Table) -> None:
        for key in before.models.keys() | after.models.keys():
            old, new = before.models.get(key), after.models.get(key)
            if old == new:
                continue
            if new is None:
                _LOG.info("model removed", extra={"fields": {"model": key}})
                continue
            fields = {"model": key, "endpoints": len(new.endpoints), "reason": new.reason}
            _LOG.info("model changed", extra={"fields": fields})
        for note in set(after.notes) - set(before.notes):
            _LOG.warning("discovery", extra={"fields": {"note": note}})
