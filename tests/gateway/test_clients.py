"""The OpenAI Python client, unchanged, against the gateway: what most callers are.

Proves: streams, whole answers, the list of models, and errors arrive as the client's own types.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import engine as fake
import openai
import pytest
from engine import ROLE, FakeEngine, token


@pytest.fixture
async def client_for() -> AsyncIterator[Any]:
    made: list[openai.AsyncOpenAI] = []

    def make(port: int) -> openai.AsyncOpenAI:
        url = f"http://127.0.0.1:{port}/v1"
        made.append(openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0))
        return made[-1]

    yield make
    for client in made:
        await client.close()


MESSAGES: Any = [{"role": "user", "content": "hi"}]


async def test_it_streams_answers_whole_and_lists_models(gateway: Any, client_for: Any) -> None:
    async with FakeEngine(fake.stream(["Hé", "llo"])) as engine, gateway(engine) as running:
        client = client_for(running.port)
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == "Héllo"
        whole = await client.chat.completions.create(model="m", messages=MESSAGES)
        assert whole.choices[0].message.content == "Héllo"
        assert whole.usage.completion_tokens == 2
        assert [model.id async for model in client.models.list()] == ["m"]
        assert (await client.models.retrieve("m")).owned_by == "vllm-fleet"


async def test_it_gets_the_usage_that_it_asks_for(gateway: Any, client_for: Any) -> None:
    async with FakeEngine(fake.stream(["a"])) as engine, gateway(engine) as running:
        options = {"include_usage": True}
        stream = await client_for(running.port).chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options=options
        )
        assert [chunk.usage.total_tokens async for chunk in stream if chunk.usage] == [8]


async def test_errors_are_its_own_types(gateway: Any, client_for: Any) -> None:
    async with FakeEngine(fake.answer(503, {"error": "full"})) as engine, gateway(engine) as running:
        client = client_for(running.port)
        with pytest.raises(openai.NotFoundError, match="Models served here: m"):
            await client.chat.completions.create(model="x", messages=MESSAGES)
        with pytest.raises(openai.InternalServerError, match="full") as caught:
            await client.chat.completions.create(model="m", messages=MESSAGES)
        assert caught.value.response.headers["retry-after"] == "1"


async def test_a_broken_stream_raises_in_it(gateway: Any, client_for: Any) -> None:
    async with (
        FakeEngine(fake.pieces([ROLE, token("a")], then="reset")) as engine,
        gateway(engine) as running,
    ):
        client = client_for(running.port)
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="connection to the engine broke"):
            [chunk async for chunk in stream]
