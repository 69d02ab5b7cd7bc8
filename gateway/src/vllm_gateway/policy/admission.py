"""Who may come in: a list of small checks with one signature, the same for every route.

The list is the documentation. The checks run in order, before the body is read, so that what is refused costs
little; what a check takes is given back when the request ends, in the reverse order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from cachetools import LRUCache

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keyring import Keyring
from vllm_gateway.policy.keys import Caller
from vllm_gateway.policy.rates import Rates
from vllm_gateway.routing.table import Table

_VIEWS = 256


class Visit(Protocol):
    """One request on its way in. `caller` is set as soon as it is known; `held` is given back at the end."""

    headers: Mapping[bytes, bytes]
    caller: Caller
    held: ExitStack


@dataclass(frozen=True, slots=True)
class Admission:
    """The door: the keys, the rates, and which models each caller sees."""

    keyring: Keyring
    rates: Rates
    _views: LRUCache[Caller, tuple[Table, Table]] = field(default_factory=lambda: LRUCache(_VIEWS))

    async def admit(self, visit: Visit) -> None:
        """Lets a request in, inside its `with visit.held`. Raises GatewayError (401, 429)."""
        for check in CHECKS:
            await check(self, visit)

    def view(self, table: Table, caller: Caller) -> Table:
        """The table as the caller may see it."""
        if "*" in caller.models:
            return table
        known = self._views.get(caller)
        if known is None or known[0] is not table:
            known = self._views[caller] = (table, table.seen_by(caller.may_use))
        return known[1]

    def public_view(self, table: Table, headers: Mapping[bytes, bytes]) -> Table:
        """For /health, which is open to all: no names for those who could not call. Counts nothing."""
        try:
            return self.view(table, self.keyring.authenticate(headers))
        except GatewayError:
            return Table(complete=table.complete)


Check = Callable[[Admission, Visit], Awaitable[None]]


async def identify(admission: Admission, visit: Visit) -> None:
    """401 without a good key where one is needed."""
    visit.caller = admission.keyring.authenticate(visit.headers)


async def take_permit(admission: Admission, visit: Visit) -> None:
    """429 over the key's requests at once."""
    if visit.caller.limits.concurrency is not None:
        visit.held.enter_context(admission.rates.permit(visit.caller))


async def count(admission: Admission, visit: Visit) -> None:
    """429 over the key's requests or tokens a minute."""
    await admission.rates.admit(visit.caller)


CHECKS: tuple[Check, ...] = (identify, take_permit, count)
