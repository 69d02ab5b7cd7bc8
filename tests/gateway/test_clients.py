"""The OpenAI and the Anthropic Python clients, unchanged, against the gateway: what most callers are.

Proves: streams, whole answers, the list of models, and errors arrive as the clients' own types, on every
route that they have a method for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import engine as fake
import families
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


async def test_responses_and_transcriptions_arrive_too(gateway: Any, client_for: Any) -> None:
    async with FakeEngine(families.script(["Hé", "llo"])) as engine, gateway(engine) as running:
        client = client_for(running.port)
        whole = await client.responses.create(model="m", input="hi")
        assert (whole.output_text, whole.usage.output_tokens) == ("Héllo", 2)
        async with client.responses.stream(model="m", input="hi") as stream:
            kinds = [event.type async for event in stream]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        file = ("a.wav", b"RIFF")
        assert (await client.audio.transcriptions.create(model="m", file=file)).text == "Héllo"
        assert (await client.embeddings.create(model="m", input="x")).data[0].embedding == [0.5]


async def test_an_error_event_of_a_response_is_its_own_type(gateway: Any, client_for: Any) -> None:
    events = families.response_events(["a"])[:3]
    async with FakeEngine(fake.pieces(events, then="reset")) as engine, gateway(engine) as running:
        stream = await client_for(running.port).responses.create(model="m", input="hi", stream=True)
        last = [event async for event in stream][-1]
        assert (last.type, last.code, last.sequence_number) == ("error", "engine_closed", 3)


@pytest.fixture
async def anthropic_for() -> AsyncIterator[Any]:
    made: list[anthropic.AsyncAnthropic] = []

    def make(port: int, key: str = "any") -> anthropic.AsyncAnthropic:
        made.append(anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0))
        return made[-1]

    yield make
    for client in made:
        await client.close()


async def test_anthropic_streams_answers_whole_and_counts(gateway: Any, anthropic_for: Any) -> None:
    async with FakeEngine(families.script(["Hé", "llo"])) as engine, gateway(engine) as running:
        client = anthropic_for(running.port)
        async with client.messages.stream(model="m", max_tokens=9, messages=MESSAGES) as stream:
            assert "".join([text async for text in stream.text_stream]) == "Héllo"
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 2)
        whole = await client.messages.create(model="m", max_tokens=9, messages=MESSAGES)
        assert whole.content[0].text == "Héllo"
        counted = await client.messages.count_tokens(model="m", messages=MESSAGES)
        assert counted.input_tokens == families.PROMPT


async def test_anthropics_key_is_looked_at_and_goes_no_further(
    gateway: Any, anthropic_for: Any, tmp_path: Path
) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [{name: alice, key: sk-alice-8f2c6b1d9a}]")
    options = {"auth": {"keysFile": str(tmp_path)}}
    async with FakeEngine(families.script()) as engine, gateway(engine, options=options) as running:
        known = anthropic_for(running.port, "sk-alice-8f2c6b1d9a")
        await known.messages.create(model="m", max_tokens=9, messages=MESSAGES)
        assert "x-api-key" not in engine.seen[0].headers
        with pytest.raises(anthropic.AuthenticationError):
            await anthropic_for(running.port, "sk-nobody-0000").messages.count_tokens(
                model="m", messages=MESSAGES
            )


async def test_anthropics_errors_are_its_own_types(gateway: Any, anthropic_for: Any) -> None:
    begun = families.message_events(["a"])[:3]
    async with FakeEngine(fake.pieces(begun, then="reset")) as engine, gateway(engine) as running:
        client = anthropic_for(running.port)
        with pytest.raises(anthropic.NotFoundError, match="Models served here: m"):
            await client.messages.create(model="x", max_tokens=9, messages=MESSAGES)
        with pytest.raises(anthropic.APIStatusError, match="connection to the engine broke"):
            async with client.messages.stream(model="m", max_tokens=9, messages=MESSAGES) as stream:
                [event async for event in stream]
