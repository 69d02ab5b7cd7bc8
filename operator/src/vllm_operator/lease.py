"""One writer: leader election over a coordination.k8s.io Lease.

The client's own elector lets a refused connection escape and leaves its leader at work without a lease. Here
any exception is a failed renewal, the work is cancelled and awaited before another replica may begin
(renewSeconds < durationSeconds), and the lease is given back when the process ends, so that a hand-over takes
seconds. As in Kubernetes' own, an observer counts the holder's term from when it saw the lease change, on its
own clock: no two clocks are compared.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from vllm_operator.clock import Clock
from vllm_operator.errors import NotFound
from vllm_operator.kinds import LEASES, Body, Kind, ObjectKey
from vllm_operator.settings import LeaseSettings
from vllm_operator.tasks import stop

log = logging.getLogger(__name__)


class Store(Protocol):
    async def get(self, kind: Kind, key: ObjectKey) -> Body: ...

    async def create(self, kind: Kind, body: Body) -> Body: ...

    async def replace(self, kind: Kind, body: Body) -> Body: ...


class Lease:
    """`run(work)` keeps at it: wait for the lease, work while it is held, and again after it was lost."""

    def __init__(
        self, store: Store, key: ObjectKey, identity: str, settings: LeaseSettings, clock: Clock
    ) -> None:
        self.is_leader = False
        self.last_answer = clock.monotonic()
        self._store, self._key, self._identity = store, key, identity
        self._settings, self._clock = settings, clock
        self._unsure = False
        self._trouble = ""
        self._seen: tuple[str, float] = ("", 0.0)  # the lease's resourceVersion, and when it was first seen

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. `work` runs while the lease is held and is cancelled when it cannot be renewed."""
        while True:
            while not await self._try_to_hold():
                await self._clock.sleep(self._settings.retry_seconds)
            await self._lead(work)

    async def _lead(self, work: Callable[[], Awaitable[None]]) -> None:
        self.is_leader = True
        log.info("leading", extra={"identity": self._identity})
        job = asyncio.ensure_future(work())
        keeper = asyncio.create_task(self._keep())
        try:
            await asyncio.wait((job, keeper), return_when=asyncio.FIRST_COMPLETED)
            if job.done() and not job.cancelled() and (error := job.exception()):
                raise error
        finally:
            await stop(keeper, job)
            self.is_leader = False
            log.info("not leading any more", extra={"identity": self._identity})
            await self._release()

    async def _keep(self) -> None:
        """Returns when the lease was not renewed for renewSeconds, or another holds it."""
        renewed = self._clock.monotonic()
        while self._clock.monotonic() - renewed < self._settings.renew_seconds:
            await self._clock.sleep(self._settings.retry_seconds)
            deadline = renewed + self._settings.renew_seconds - self._clock.monotonic()
            asked = self._clock.monotonic()
            try:
                # Not wait_for(): before Python 3.12 it loses a cancellation that comes as the call ends, and
                # a leader that is told to stop would renew for ever (python/cpython#86296).
                async with asyncio.timeout(max(deadline, 0.01)):
                    held = await self._try_to_hold()
            except TimeoutError:
                return
            if held:
                renewed = asked
            elif not self._unsure:
                return

    async def _try_to_hold(self) -> bool:
        """One attempt to take or renew. `_unsure`: it failed without another being seen to hold the lease."""
        self._unsure = False
        try:
            return await self._attempt()
        except Exception as error:  # noqa: BLE001  whatever went wrong, the lease was not renewed
            self._unsure = True
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:  # told once, and not with every attempt
                log.warning("lease not renewed", extra={"error": trouble})
            self._trouble = trouble
            return False

    async def _attempt(self) -> bool:
        try:
            lease = await self._store.get(LEASES, self._key)
        except NotFound:
            await self._store.create(LEASES, self._fresh())
            self.last_answer = self._clock.monotonic()
            return True
        self.last_answer, self._trouble = self._clock.monotonic(), ""
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") not in (self._identity, "", None) and not self._expired(lease):
            return False
        await self._store.replace(LEASES, {**lease, "spec": self._held(spec)})
        return True

    def _expired(self, lease: Body) -> bool:
        version, now = lease["metadata"]["resourceVersion"], self._clock.monotonic()
        if version != self._seen[0]:
            self._seen = (version, now)
        term = (lease.get("spec") or {}).get("leaseDurationSeconds") or self._settings.duration_seconds
        return bool(now - self._seen[1] > term)

    def _fresh(self) -> Body:
        metadata = {"name": self._key.name, "namespace": self._key.namespace}
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": self._held({}),
        }

    def _held(self, before: dict[str, Any]) -> dict[str, Any]:
        now = self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._settings.duration_seconds,
            "acquireTime": before.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": (before.get("leaseTransitions") or 0) + (0 if mine else 1),
        }

    async def _release(self) -> None:
        """Gives the lease back if it is ours, so that a waiting replica need not wait for its end."""
        try:
            async with asyncio.timeout(2 * self._settings.retry_seconds):
                lease = await self._store.get(LEASES, self._key)
                spec = lease.get("spec") or {}
                if spec.get("holderIdentity") == self._identity:
                    freed = {**spec, "holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._store.replace(LEASES, {**lease, "spec": freed})
        except Exception as error:  # noqa: BLE001  then it simply ends by itself
            log.info("lease not released", extra={"error": str(error)})
