"""Which engine a request reaches, over real sockets and both channels.

Proves:
- an engine that keeps failing, before or in the middle of an answer, is left alone, is tried again by one
  request when its time has come, and serves on if that is well, from its first token on; each way to fail
  counts, as the metric shows;
- a thousand 4xx answers, a full engine's 503 and callers that leave never count (FACTS E12);
- the only engine of a model is never left alone;
- prompts that begin alike reach one engine, whoever asks and whatever the route; a session and a key stay
  with their engine and their canary;
- failures with good answers in between, and reused connections that were closed, do not count;
- an engine at its limit gets nothing while another has room;
- in each, nothing is in flight afterwards and no connection is left open.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import engine as fake
import pytest
from engine import ENGINE_DIED, ROLE, FakeEngine, chat_events, finish, token
from http_caller import Caller, ask, until

from vllm_gateway.routing.table import Endpoint, Limits, Model, Table
from vllm_gateway.settings import Routing

SIMPLE = {"message": "hi"}
# Good answers must be faster than this on a busy machine too.
SHORT = {"first_token_timeout": {"firstToken": "400ms"}, "idle_timeout": {"idle": "400ms"}}
FAILURES = {
    "status_500": fake.answer(500, {"error": {"message": "EngineCore is dead"}}),
    "reset": fake.pieces([ROLE, token("a")], then="reset"),
    "eof": fake.pieces([ROLE, token("a")], then="close"),
    "idle_timeout": fake.pieces([ROLE, token("a")], then="stall"),
    "first_token_timeout": fake.never,
    "bad_response": fake.raw([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"]),
    "in_band_error": fake.pieces([ROLE, token("a"), ENGINE_DIED, fake.DONE]),
    "abort": fake.pieces([ROLE, finish("abort"), fake.DONE]),
}


def options(**more: Any) -> dict[str, Any]:
    return {"refreshInterval": "1h", "ejection": {"failures": 2}, **more}


class Clock:
    """What ejections are timed by, turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def by_hand(running: Any) -> Clock:
    clock = Clock()
    running.gateway.engines.balancer.health._clock = clock
    return clock


def ejected(running: Any) -> float:
    return float(running.metric("ejected_endpoints", model="m"))


async def stream(running: Any, times: int = 1) -> None:
    for _ in range(times):
        await ask(running.port, "/chat/stream", SIMPLE)


@pytest.mark.parametrize("reason", FAILURES)
async def test_an_engine_that_keeps_failing_is_left_alone_and_then_tried(gateway: Any, reason: str) -> None:
    async with (
        FakeEngine(FAILURES[reason]) as ill,
        FakeEngine() as well,
        gateway(ill, well, options=options(timeouts=SHORT.get(reason, {}))) as running,
    ):
        clock = by_hand(running)
        await until_async(lambda: stream(running), lambda: ejected(running) == 1)
        assert running.metric("upstream_errors_total", model="m", reason=reason) == 2
        seen = len(ill.seen)
        await stream(running, 10)
        assert len(ill.seen) == seen
        ill.script = fake.stream()
        clock.now += 10.5
        await until_async(lambda: stream(running), lambda: len(ill.seen) > seen)
        await running.settled()
        assert ejected(running) == 0
        await until_async(lambda: stream(running), lambda: len(ill.seen) > seen + 1)
        await running.settled()


async def until_async(act: Any, condition: Any) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await act()


class Held:
    """An engine's script that stops before and after the first token until it is let go on."""

    def __init__(self) -> None:
        self.first, self.rest = asyncio.Event(), asyncio.Event()

    async def __call__(self, reply: fake.Reply) -> None:
        await reply.head()
        await self.first.wait()
        await reply.chunk(ROLE + token("a"))
        await self.rest.wait()
        await reply.chunk(b"".join(chat_events([], with_usage=True)[1:]))
        await reply.end()


async def test_one_request_is_the_trial_until_its_first_token(gateway: Any) -> None:
    """Not until its end, which may be minutes later; and not at its head, which a hung engine sends too."""
    held = Held()

    async with (
        FakeEngine(FAILURES["status_500"]) as ill,
        FakeEngine() as well,
        gateway(ill, well, options=options()) as running,
    ):
        clock = by_hand(running)
        await until_async(lambda: stream(running), lambda: ejected(running) == 1)
        clock.now += 10.5
        ill.script, seen = held, len(ill.seen)
        trials: list[asyncio.Task[None]] = []

        async def another() -> None:
            trials.append(asyncio.create_task(stream(running)))
            await asyncio.sleep(0.01)

        await until_async(another, lambda: len(ill.seen) > seen)
        trials += [asyncio.create_task(stream(running)) for _ in range(10)]
        await until(lambda: running.in_flight == 1)
        assert len(ill.seen) == seen + 1
        assert ejected(running) == 1
        held.first.set()
        await until(lambda: ejected(running) == 0)
        trials += [asyncio.create_task(stream(running)) for _ in range(10)]
        await until(lambda: len(ill.seen) > seen + 1)
        held.rest.set()
        await asyncio.gather(*trials)
        assert ejected(running) == 0
        await running.settled()


@pytest.mark.parametrize("status", [400, 404, 422, 503])
async def test_e12_what_callers_do_wrong_and_a_full_engine_never_count(gateway: Any, status: int) -> None:
    script = fake.answer(status, {"error": {"message": "the prompt is too long"}})
    async with (
        FakeEngine(script) as one,
        FakeEngine(script) as two,
        gateway(one, two, options=options()) as running,
    ):
        async with await Caller.connect(running.port) as caller:
            for _ in range(1000 if status == 400 else 50):
                caller.send("/chat", SIMPLE)
                assert (await caller.answer()).status == status
                assert not running.gateway.engines.balancer.health._states
        await running.settled()


async def test_callers_that_leave_never_count(gateway: Any) -> None:
    script = fake.forever(token("a"), first=[ROLE])
    async with (
        FakeEngine(script) as one,
        FakeEngine(script) as two,
        gateway(one, two, options=options()) as running,
    ):
        for number in range(50):
            async with await Caller.connect(running.port) as caller:
                caller.send("/chat/stream", SIMPLE)
                if number % 2:
                    await caller.head()
                caller.reset()
        await running.settled()
        await until(lambda: one.active == two.active == 0)
        assert not running.gateway.engines.balancer.health._states


async def test_the_only_engine_is_never_left_alone(gateway: Any) -> None:
    async with FakeEngine(FAILURES["status_500"]) as only, gateway(only, options=options()) as running:
        for _ in range(10):
            assert (await ask(running.port, "/chat", SIMPLE)).status == 502
        assert len(only.seen) == 10
        assert ejected(running) == 0
        await running.settled()


async def test_a_refused_connection_counts_and_the_caller_does_not_notice(gateway: Any) -> None:
    async with FakeEngine() as well, FakeEngine() as gone, gateway(gone, well, options=options()) as running:
        await gone.__aexit__(None, None, None)
        await until_async(lambda: good(running), lambda: ejected(running) == 1)
        assert running.metric("upstream_errors_total", model="m", reason="connect") == 2
        assert running.metric("retries_total") == 2


async def good(running: Any) -> None:
    assert (await ask(running.port, "/chat", SIMPLE)).status == 200


def fleet(*engines: FakeEngine, routing: Routing | None = None, most: int | None = None) -> Table:
    endpoints = tuple(Endpoint(f"pod-{number}", "127.0.0.1", end.port) for number, end in enumerate(engines))
    limits = Limits(max_in_flight=most)
    return Table.of([Model("m", "m", "ns", ("m",), endpoints, routing=routing, limits=limits)])


async def test_prompts_that_begin_alike_reach_one_engine(gateway: Any) -> None:
    async with (
        FakeEngine() as a,
        FakeEngine() as b,
        FakeEngine() as c,
        gateway(a, options=options()) as running,
    ):
        running.gateway.holder.put(fleet(a, b, c, routing="PrefixHash"))
        users = set()
        for number in range(12):
            before = [len(engine.seen) for engine in (a, b, c)]
            beginning = f"Conversation {number}: " + "x" * 100
            system = {"role": "system", "content": "You are a poet."}
            turn = {"role": "user", "content": [{"type": "text", "text": beginning + " first"}]}
            chat = {"model": "m", "messages": [system, turn, {"role": "assistant", "content": str(number)}]}
            await ask(running.port, "/v1/chat/completions", chat)
            await ask(running.port, "/chat", {"message": beginning + " second"})
            await ask(running.port, "/v1/completions", {"model": "m", "prompt": [beginning + " third"]})
            reached = [len(engine.seen) - count for engine, count in zip((a, b, c), before, strict=True)]
            assert sorted(reached) == [0, 0, 3]
            users.add(reached.index(3))
        assert len(users) > 1
        for body in (
            {"model": "m", "prompt": [1, 2]},
            {"model": "m", "messages": []},
            {"model": "m", "messages": 3},
        ):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            assert (await ask(running.port, path, body)).status == 200
        await running.settled()


async def test_a_session_stays_with_its_engine(gateway: Any) -> None:
    settings = options(routing={"strategy": "Session", "sessionHeader": "x-chat"})
    async with FakeEngine() as a, FakeEngine() as b, gateway(a, b, options=settings) as running:
        reached = set()
        for number in range(10):
            before = len(a.seen)
            for _ in range(4):
                await ask(running.port, "/chat", SIMPLE, headers={"x-chat": f"session-{number}"})
            assert len(a.seen) - before in (0, 4)
            reached.add(len(a.seen) - before)
        assert reached == {0, 4}


async def test_a_key_stays_with_its_canary(gateway: Any, tmp_path: Path) -> None:
    keys = "".join(f"- {{name: caller-{n}, key: sk-caller-{n:04}}}\n" for n in range(20))
    (tmp_path / "keys.yaml").write_text(f"keys:\n{keys}")
    settings = options(auth={"keysFile": str(tmp_path / "keys.yaml")})
    async with FakeEngine() as stable, FakeEngine() as canary, gateway(stable, options=settings) as running:
        ends = [(Endpoint(name, "127.0.0.1", end.port),) for name, end in (("s", stable), ("c", canary))]
        running.gateway.holder.put(
            Table.of(
                [
                    Model("stable", "m", "ns", ("chat",), ends[0], weight=60),
                    Model("canary", "m", "ns", ("chat",), ends[1], weight=40),
                ]
            )
        )
        for number in range(20):
            before = len(canary.seen)
            for _ in range(3):
                headers = {"x-api-key": f"sk-caller-{number:04}"}
                await ask(running.port, "/chat", SIMPLE | {"model": "chat"}, headers=headers)
            assert len(canary.seen) - before in (0, 3)
        assert 0 < len(canary.seen) < 60
        await running.settled()
        assert running.metric("requests_total", model="ns/canary", route="/chat", code="200") == len(
            canary.seen
        )


async def test_an_engine_at_its_limit_gets_nothing_while_another_has_room(gateway: Any) -> None:
    script = fake.forever(token("a"), first=[ROLE])
    async with FakeEngine(script) as a, FakeEngine(script) as b, gateway(a, options=options()) as running:
        running.gateway.holder.put(fleet(a, b, routing="Session", most=2))
        async with (
            await Caller.connect(running.port) as one,
            await Caller.connect(running.port) as two,
            await Caller.connect(running.port) as three,
        ):
            for caller in (one, two, three):
                caller.send("/chat/stream", SIMPLE, headers={"x-session-id": "the same"})
                await caller.head()
            assert sorted((a.active, b.active)) == [1, 2]
        await running.settled()


async def test_failures_that_are_not_in_a_row_do_not_count(gateway: Any) -> None:
    def every_other() -> fake.Script:
        turns = iter(range(1000))

        async def script(reply: fake.Reply) -> None:
            chosen = fake.stream() if next(turns) % 2 else fake.pieces([ROLE, token("a")], then="close")
            await chosen(reply)

        return script

    async with (
        FakeEngine(every_other()) as one,
        FakeEngine(every_other()) as two,
        # None is short: on a busy machine a good answer may take 100 ms, and would be one failure in a row.
        gateway(one, two, options=options(timeouts={})) as running,
    ):
        for _ in range(40):
            await stream(running)
            await running.settled()
            assert ejected(running) == 0
        assert min(len(one.seen), len(two.seen)) > 4


async def test_a_reused_connection_that_was_closed_does_not_count(gateway: Any) -> None:
    script = fake.in_turn(fake.stream(), fake.raw([], then="close"), fake.stream())
    async with FakeEngine(script) as engine, gateway(engine, options=options()) as running:
        for _ in range(2):
            assert (await ask(running.port, "/chat", SIMPLE)).status == 200
            await running.settled()
        assert len(engine.seen) == 3
        assert running.metric("upstream_errors_total", model="m", reason="closed_early") == 1
        assert not running.gateway.engines.balancer.health._states
