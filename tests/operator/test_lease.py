"""The lease: one leader, whatever fails.

Proves: the first takes it; a second waits; release hands over at once; a holder that died is waited for by
the observer's own clock; a leader that cannot renew ends its work before another may begin; any exception is
a failed renewal; a lease taken by another ends the work at once; work that fails is raised; cancellation
releases; two at once never both work, over a store that fails at random.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from fake_clock import FakeClock, settle
from kube_api import KubeApi, resource
from kube_store import Refused

from vllm_operator.errors import Conflict, NotFound, Unavailable
from vllm_operator.kinds import Body, Kind, ObjectKey
from vllm_operator.lease import Lease
from vllm_operator.settings import LeaseSettings

KEY = ObjectKey("ns", "vllm-operator")
LEASES = resource("leases")


class Store:
    """The fake API server's store without the socket, so that a fake clock decides when things happen."""

    def __init__(self) -> None:
        self.api = KubeApi()
        self.fail: Callable[[], BaseException | None] = lambda: None

    async def _call(self, work: Callable[[], Body]) -> Body:
        await asyncio.sleep(0)
        if error := self.fail():
            raise error
        try:
            return work()
        except Refused as refused:
            kind = NotFound if refused.code == 404 else Conflict
            raise kind(refused.code, refused.reason, refused.message) from refused

    async def get(self, _kind: Kind, key: ObjectKey) -> Body:
        return await self._call(lambda: self.api.get(LEASES, *key))

    async def create(self, _kind: Kind, body: Body) -> Body:
        return await self._call(lambda: self.api.create(LEASES, KEY.namespace, body))

    async def replace(self, _kind: Kind, body: Body) -> Body:
        return await self._call(
            lambda: self.api.store.replace(LEASES, (KEY.namespace, KEY.name), body, status=False)
        )


class Replica:
    def __init__(self, store: Store, name: str, clock: FakeClock, at_work: list[str]) -> None:
        self.name, self.at_work = name, at_work
        self.lease = Lease(store, KEY, name, LeaseSettings(), clock)
        self.works = 0

    async def work(self) -> None:
        self.works += 1
        self.at_work.append(self.name)
        try:
            await asyncio.Event().wait()
        finally:
            self.at_work.remove(self.name)


@asynccontextmanager
async def running(
    replica: Replica, work: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(replica.lease.run(work or replica.work))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def store() -> Store:
    return Store()


async def test_the_first_leads_and_keeps_renewing(clock: FakeClock, store: Store) -> None:
    at_work: list[str] = []
    one = Replica(store, "one", clock, at_work)
    async with running(one):
        await clock.advance(120)
        assert at_work == ["one"]
        assert one.works == 1
        assert one.lease.is_leader
        spec = store.api.get(LEASES, *KEY)["spec"]
    assert spec["holderIdentity"] == "one"
    assert spec["leaseTransitions"] == 1
    assert spec["leaseDurationSeconds"] == 15
    assert not one.lease.is_leader


async def test_release_hands_over_within_a_retry(clock: FakeClock, store: Store) -> None:
    at_work: list[str] = []
    two = Replica(store, "two", clock, at_work)
    async with running(Replica(store, "one", clock, at_work)):
        await clock.advance(1)
        second = asyncio.create_task(two.lease.run(two.work))
        await clock.advance(60)
        assert at_work == ["one"]
    assert store.api.get(LEASES, *KEY)["spec"]["holderIdentity"] == ""
    await clock.advance(2.1)
    assert at_work == ["two"]
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)


async def test_a_dead_holder_is_waited_for(clock: FakeClock, store: Store) -> None:
    at_work: list[str] = []
    one = Replica(store, "one", clock, at_work)
    async with running(one):
        await clock.advance(5)
        body = store.api.get(LEASES, *KEY)
    store.api.patch(
        LEASES, *KEY, {"spec": body["spec"]}
    )  # as if it had never released: the process was killed
    async with running(Replica(store, "two", clock, at_work)):
        await clock.advance(14)
        assert at_work == []
        await clock.advance(5)
        assert at_work == ["two"]


@pytest.mark.parametrize(
    "error",
    [Unavailable(0, "", "refused"), ConnectionRefusedError(), KeyError("spec"), Conflict(409, "", "")],
)
async def test_a_leader_that_cannot_renew_ends_before_another_begins(
    clock: FakeClock, store: Store, error: Exception
) -> None:
    at_work: list[str] = []
    async with running(Replica(store, "one", clock, at_work)) as task:
        await clock.advance(1)
        store.fail = lambda: error
        await clock.advance(8)
        assert at_work == ["one"]
        await clock.advance(5)
        assert at_work == []
        assert not task.done()
        store.fail = lambda: None
        await clock.advance(20)
        assert at_work == ["one"]


async def test_a_lease_taken_by_another_ends_the_work_at_once(clock: FakeClock, store: Store) -> None:
    at_work: list[str] = []
    async with running(Replica(store, "one", clock, at_work)):
        await clock.advance(1)
        store.api.patch(LEASES, *KEY, {"spec": {"holderIdentity": "other"}})
        await clock.advance(3)
        assert at_work == []


async def test_work_that_fails_is_raised_and_the_lease_released(clock: FakeClock, store: Store) -> None:
    async def broken() -> None:
        raise RuntimeError("broken")

    replica = Replica(store, "one", clock, [])
    with pytest.raises(RuntimeError, match="broken"):
        await replica.lease.run(broken)
    assert store.api.get(LEASES, *KEY)["spec"]["holderIdentity"] == ""


async def test_work_is_awaited_before_the_lease_goes(clock: FakeClock, store: Store) -> None:
    seen: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append(store.api.get(LEASES, *KEY)["spec"]["holderIdentity"])

    async with running(Replica(store, "one", clock, []), slow_to_end):
        await clock.advance(1)
    assert seen == ["one"]


@pytest.mark.parametrize("seed", range(5))
async def test_two_never_work_at_once(clock: FakeClock, store: Store, seed: int) -> None:
    dice = random.Random(seed)
    store.fail = lambda: Unavailable(0, "", "flaky") if dice.random() < 0.4 else None
    at_work: list[str] = []
    replicas = [Replica(store, name, clock, at_work) for name in ("one", "two", "three")]
    async with running(replicas[0]), running(replicas[1]), running(replicas[2]):
        led: set[str] = set()
        for _ in range(200):
            await clock.advance(dice.random() * 4)
            assert len(at_work) <= 1
            led |= set(at_work)
        store.fail = lambda: None
        await clock.advance(40)
        await settle()
        assert len(at_work) == 1
    assert led


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_at_any_step_of_a_renewal_is_kept(
    clock: FakeClock, store: Store, steps: int
) -> None:
    """asyncio.wait_for() lost one that came as the renewal ended, and the leader renewed for ever."""
    replica = Replica(store, "one", clock, [])
    task = asyncio.create_task(replica.lease.run(replica.work))
    await clock.advance(1)
    loop = asyncio.get_running_loop()

    def cancel_after(left: int) -> None:
        loop.call_soon(cancel_after, left - 1) if left else task.cancel()

    def begin() -> None:
        store.fail = lambda: None
        cancel_after(steps)

    store.fail = begin
    await clock.advance(2)
    await settle()
    assert task.done()
    assert store.api.get(LEASES, *KEY)["spec"]["holderIdentity"] == ""
