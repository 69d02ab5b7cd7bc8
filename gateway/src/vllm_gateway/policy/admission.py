"""Who may come in: a list of small checks with one signature, the same for every route.

The list is the documentation. The checks run in order, before the body is read, so that what is refused costs
little.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cachetools import LRUCache

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keyring import Keyring
from vllm_gateway.policy.keys import Caller
from vllm_gateway.policy.rates import Permit, Rates
from vllm_gateway.routing.table import Table

_VIEWS = 256


class Visit(Protocol):
    """One request on its way in. `caller` is set as soon as it is known; `permit`, if it has one, is given
    back at its end, however it ends.
    """

    headers: Mapping[bytes, bytes]
    caller: Caller
    permit: Permit | None


class Views:
    """What callers see of the table in force. Of a former one nothing is kept: callers that do not come back
    would each hold a table of their own, which for a thousand models is a megabyte.
    """

    def __init__(self) -> None:
        self._table: Table | None = None
        self._views: LRUCache[Caller, Table] = LRUCache(_VIEWS)

    def of(self, table: Table, caller: Caller) -> Table:
        if table is not self._table:
            self._table = table
            self._views.clear()
        view = self._views.get(caller)
        if view is None:
            view = self._views[caller] = table.seen_by(caller.may_use)
        return view


@dataclass(frozen=True, slots=True)
class Admission:
    """The door: the keys, the rates, and which models each caller sees."""

    keyring: Keyring
    rates: Rates
    _views: Views = field(default_factory=Views)

    async def admit(self, visit: Visit) -> None:
        """Lets a request in. Raises GatewayError (401, 429)."""
        for check in CHECKS:
            waiting = check(self, visit)
            if waiting is not None:
                await waiting

    def view(self, table: Table, caller: Caller) -> Table:
        """The table as the caller may see it."""
        return table if "*" in caller.models else self._views.of(table, caller)

    def public_view(self, table: Table, headers: Mapping[bytes, bytes]) -> Table:
        """For /health, which is open to all: no names for those who could not call. Counts nothing."""
        try:
            return self.view(table, self.keyring.authenticate(headers))
        except GatewayError:
            return Table(complete=table.complete)


Check = Callable[[Admission, Visit], Awaitable[None] | None]  # to be awaited where it has to ask a server


def identify(admission: Admission, visit: Visit) -> None:
    """401 without a good key where one is needed."""
    visit.caller = admission.keyring.authenticate(visit.headers)


def take_permit(admission: Admission, visit: Visit) -> None:
    """429 over the key's requests at once."""
    if visit.caller.limits.concurrency is not None:
        visit.permit = admission.rates.permit(visit.caller)


def count(admission: Admission, visit: Visit) -> Awaitable[None] | None:
    """429 over the key's requests or tokens a minute."""
    return admission.rates.admit(visit.caller)


CHECKS: tuple[Check, ...] = (identify, take_permit, count)
