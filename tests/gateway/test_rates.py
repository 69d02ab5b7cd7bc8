"""What a key may use.

Proves, in memory and against a real Valkey:
- requests over the limit are a 429 whose Retry-After is when one is free again, and then one is;
- tokens are checked before and charged after; the request that goes over is served, the next one is not;
- what is refused for tokens costs no request; keys do not share counts; keys without limits are not counted;
- two gateways with one Valkey share their counts; its password may be changed while they run;
- Valkey that goes away: requests are served with counts of one's own, without waiting for each; it is
  used again when it is back;
- requests at once come back however they end, per key;
- keys that are not used any more take no memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from valkey_server import Valkey, valkey

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keys import Caller, KeyLimits
from vllm_gateway.policy.minutes import FixedMinute, SlidingMinute
from vllm_gateway.policy.rates import Permit, Rates
from vllm_gateway.policy.shared import Shared
from vllm_gateway.settings import RedisSettings


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def rates_at(server: Valkey | None, *, clock: Clock | None = None) -> AsyncIterator[Rates]:
    redis_settings = RedisSettings(url=server.url if server is not None else None)
    shared = Shared(redis_settings, clock or Clock())
    rates = Rates(shared, lambda: time.time())  # noqa: PLW0108 - the test's, which is put in later
    try:
        yield rates
    finally:
        await rates.stop()
        await shared.close()


class Wall:
    """The wall clock, which limits reads, in the middle of a minute and turned by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_030.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    wall = Wall()
    monkeypatch.setattr(time, "time", wall)
    return wall


@pytest.fixture(params=["memory", "valkey"])
def store(request: pytest.FixtureRequest) -> Valkey | None:
    return request.getfixturevalue("server") if request.param == "valkey" else None


def caller(
    name: str, requests: int | None = None, tokens: int | None = None, at_once: int | None = None
) -> Caller:
    limits = KeyLimits(requests_per_minute=requests, tokens_per_minute=tokens, concurrency=at_once)
    return Caller(name, limits=limits)


async def admit(rates: Rates, who: Caller) -> None:
    waiting = rates.admit(who)
    if waiting is not None:
        await waiting


async def refused(rates: Rates, who: Caller) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await admit(rates, who)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


async def charge(rates: Rates, who: Caller, tokens: int) -> None:
    rates.charge(who, tokens)
    await rates.stop()


async def test_requests_a_minute(store: Valkey | None) -> None:
    async with rates_at(store) as rates:
        alice, bob = caller("r-alice", requests=3), caller("r-bob", requests=1)
        for _ in range(3):
            await admit(rates, alice)
        error = await refused(rates, alice)
        assert 1 <= (error.retry_after or 0) <= 60
        assert "3 requests a minute" in error.message
        await admit(rates, bob)


async def test_retry_after_is_when_a_request_is_free_again(wall: Wall) -> None:
    async with rates_at(None) as rates:
        who = caller("w-alice", requests=6)
        for _ in range(6):
            await admit(rates, who)
        waits: list[int] = []
        for _ in range(3):  # the window slides: one after the other
            error = await refused(rates, who)
            waits.append(error.retry_after or 0)
            wall.now += waits[-1]
            await admit(rates, who)
        assert waits[0] == 31  # the next minute begins in 30 s
        assert max(waits[1:]) <= 11  # a sixth of a minute


async def test_tokens_a_minute(store: Valkey | None) -> None:
    async with rates_at(store) as rates:
        who = caller("t-alice", requests=100, tokens=1000)
        await admit(rates, who)
        await charge(rates, who, 999)
        await admit(rates, who)
        await charge(rates, who, 5000)
        error = await refused(rates, who)
        assert 50 <= (error.retry_after or 0) <= 60
        assert "1000 tokens a minute" in error.message


async def test_tokens_are_free_again_after_the_window(wall: Wall) -> None:
    async with rates_at(None) as rates:
        who = caller("v-alice", tokens=10)
        wall.now += 20
        await charge(rates, who, 10)
        error = await refused(rates, who)
        assert error.retry_after == 60
        wall.now += 59
        await refused(rates, who)
        wall.now += 1
        await admit(rates, who)


async def test_what_is_refused_for_tokens_costs_no_request(store: Valkey | None) -> None:
    async with rates_at(store) as rates:
        who = caller("c-alice", requests=2, tokens=10)
        await charge(rates, who, 10)
        for _ in range(5):
            assert "tokens" in (await refused(rates, who)).message
        only_requests = caller("c-alice", requests=2)
        await admit(rates, only_requests)
        await admit(rates, only_requests)


async def test_keys_without_limits_are_not_counted(server: Valkey) -> None:
    async with rates_at(server) as rates:
        server.stop()
        try:
            await admit(rates, caller("free"))
            rates.charge(caller("free"), 100)
            assert not rates._charges
        finally:
            server.start()


async def test_two_gateways_share_their_counts(server: Valkey) -> None:
    async with rates_at(server) as one, rates_at(server) as two:
        who = caller("s-alice", requests=2, tokens=100)
        await admit(one, who)
        await admit(two, who)
        assert "requests" in (await refused(one, who)).message
        await charge(two, who, 100)
        assert "tokens" in (await refused(one, who)).message


def is_away(rates: Rates) -> bool:
    assert rates._together is not None
    return rates._together[0]._shared.away


async def test_a_valkey_that_goes_away_and_comes_back(
    server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with rates_at(server, clock=clock) as rates:
        who = caller("o-alice", requests=2)
        await admit(rates, who)
        server.stop()
        try:
            for _ in range(2):
                await admit(rates, who)
            await refused(rates, who)  # by the count of its own
            assert len(caplog.records) == 1, "asked again although it is known to be away"
            assert is_away(rates)
        finally:
            server.start()
        clock.now += 6
        await admit(rates, who)  # the new server has counted nothing
        assert not is_away(rates)
        await admit(rates, who)
        await refused(rates, who)


async def test_a_password_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    with valkey("--requirepass", "s3cret") as server:
        redis_settings = RedisSettings(
            url=server.url.replace("redis", "valkey"), password_file=str(tmp_path / "password")
        )
        shared = Shared(redis_settings)
        await admit(Rates(shared), caller("p-alice", requests=2))
        await shared.close()
        assert shared.failures == 0


async def test_a_password_that_was_rotated_is_taken_up(tmp_path: Path) -> None:
    password, clock = tmp_path / "password", Clock()
    password.write_text("first")
    with valkey("--requirepass", "first") as server:
        redis_settings = RedisSettings(url=server.url, password_file=str(password))
        shared = Shared(redis_settings, clock)
        rates = Rates(shared)
        await admit(rates, caller("n-alice", requests=2))
        with redis.Redis(port=server.port, password="first") as admin:
            admin.config_set("requirepass", "second")
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await admit(rates, caller("n-alice", requests=2))  # by the count of its own
        assert shared.failures == 1
        password.write_text("second")
        clock.now += 6
        await admit(rates, caller("n-alice", requests=2))
        await refused(rates, caller("n-alice", requests=2))  # the second that the server counts
        assert shared.failures == 1
        await shared.close()


def test_requests_at_once() -> None:
    rates = Rates(Shared(RedisSettings()))
    alice, bob = caller("alice", at_once=2), caller("bob", at_once=1)
    held: list[Permit] = [rates.permit(alice), rates.permit(bob), rates.permit(alice)]
    with pytest.raises(GatewayError) as caught:
        rates.permit(alice)
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    held.pop().give_back()
    held.append(rates.permit(alice))
    assert rates.active == 3
    for permit in held:
        permit.give_back()
    assert rates.active == 0
    assert not rates._active


def test_what_has_expired_is_forgotten(wall: Wall) -> None:
    requests, tokens = SlidingMinute(wall), FixedMinute(wall)
    for number in range(200):
        requests.hit(f"x-{number}", 5)
        tokens.hit(f"x-{number}", 5)
    assert (len(requests), len(tokens)) == (200, 200)
    wall.now += 121
    requests.hit("x-last", 5)
    tokens.hit("x-last", 5)
    assert (len(requests), len(tokens)) == (1, 1)


# Not at a minute's very end, when limits says that something is free at once.
STEPS = st.tuples(
    st.sampled_from([0.0, 0.37, 1.03, 7.01, 29.53, 31.13, 61.07, 200.11]), st.sampled_from("ab")
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=60), st.integers(1, 12))
def test_counting_here_is_as_limits_counts(wall: Wall, steps: list[tuple[float, str]], most: int) -> None:
    """So that a key is treated alike while the shared server is away."""
    wall.now = Wall().now
    item, requests = RateLimitItemPerMinute(most), SlidingMinute(wall)
    theirs = SlidingWindowCounterRateLimiter(MemoryStorage())
    for pause, name in steps:
        wall.now += pause
        assert requests.hit(name, most) == theirs.hit(item, name)
        reset = theirs.get_window_stats(item, name).reset_time
        assert requests.seconds_left(name) == pytest.approx(reset - wall.now, abs=1e-3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(STEPS, st.integers(1, 40)), max_size=40))
def test_tokens_here_are_as_limits_counts(wall: Wall, steps: list[tuple[tuple[float, str], int]]) -> None:
    wall.now = Wall().now
    item, tokens = RateLimitItemPerMinute(100), FixedMinute(wall)
    theirs = FixedWindowRateLimiter(MemoryStorage())
    for (pause, name), cost in steps:
        wall.now += pause
        assert tokens.test(name, 100) == theirs.test(item, name)
        assert tokens.hit(name, 100, cost) == theirs.hit(item, name, cost=cost)
        reset = theirs.get_window_stats(item, name).reset_time
        assert tokens.seconds_left(name) == pytest.approx(reset - wall.now, abs=1e-3)
