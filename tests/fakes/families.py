"""What vLLM 0.32 sends on the routes beside chat and completions; event by event as its sources write them.

`script` answers each route in its own words, so one fake engine stands for a vLLM that offers all of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

from engine import Reply, Script, event, stream

PROMPT = 7


def named(kind: str, **fields: object) -> bytes:
    """An event with a name, as Anthropic's and the Responses API's are."""
    return f"event: {kind}\n".encode() + event({"type": kind, **fields})


def message_start() -> bytes:
    message: dict[str, object] = {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "m",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": PROMPT, "output_tokens": 0},
    }
    return named("message_start", message=message)


BLOCK_START = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
BLOCK_STOP = named("content_block_stop", index=0)
MESSAGE_STOP = named("message_stop")
# vLLM's converter, when the engine dies under it; nothing follows.
MESSAGE_ERROR = named("error", error={"type": "internal_error", "message": "EngineCore died"})


def text_delta(text: str) -> bytes:
    return named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def message_delta(tokens: int, reason: str | None = "end_turn", cached: int = 0) -> bytes:
    usage = {"input_tokens": PROMPT - cached, "output_tokens": tokens}
    usage |= {"cache_read_input_tokens": cached} if cached else {}
    return named("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage)


def message_events(tokens: Sequence[str], reason: str | None = "end_turn", cached: int = 0) -> list[bytes]:
    """A whole stream of `/v1/messages`."""
    last = [BLOCK_STOP, message_delta(len(tokens), reason, cached), MESSAGE_STOP]
    return [message_start(), BLOCK_START, *map(text_delta, tokens), *last]


def message(tokens: Sequence[str]) -> dict[str, object]:
    return {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "".join(tokens)}],
        "model": "m",
        "stop_reason": "end_turn",
        "usage": {"input_tokens": PROMPT, "output_tokens": len(tokens)},
    }


def response(status: str, tokens: Sequence[str] = ()) -> dict[str, object]:
    content = [{"type": "output_text", "text": "".join(tokens), "annotations": []}]
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": content}
    usage = {
        "input_tokens": PROMPT,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(tokens),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT + len(tokens),
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "output": [item] if tokens else [],
        "usage": usage if tokens else None,
        "error": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def response_events(tokens: Sequence[str], last: str = "completed") -> list[bytes]:
    """A whole stream of `/v1/responses`; each event has a number."""
    place: dict[str, object] = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": []}
    started: dict[str, object] = {"response": response("in_progress")}
    told: list[tuple[str, dict[str, object]]] = [
        ("response.created", started),
        ("response.in_progress", started),
        ("response.output_item.added", {"output_index": 0, "item": item}),
        ("response.content_part.added", {**place, "part": part}),
        *(("response.output_text.delta", {**place, "delta": text, "logprobs": []}) for text in tokens),
        (f"response.{last}", {"response": response(last, tokens)}),
    ]
    return [named(kind, sequence_number=number, **fields) for number, (kind, fields) in enumerate(told)]


def transcription_events(words: Sequence[str], *, with_usage: bool) -> list[bytes]:
    """A whole stream of `/v1/audio/transcriptions`."""
    head = {"id": "trsc-1", "object": "transcription.chunk", "created": 1, "model": "m"}
    chunks = [event(head | {"choices": [{"delta": {"content": word}}]}) for word in words]
    finish = event(head | {"choices": [{"delta": {"content": ""}, "finish_reason": "stop"}]})
    counts = {"prompt_tokens": PROMPT, "completion_tokens": len(words), "total_tokens": PROMPT + len(words)}
    last = [event(head | {"choices": [], "usage": counts})] if with_usage else []
    return [*chunks, finish, *last, b"data: [DONE]\n\n"]


def script(tokens: Sequence[str] = ("Hel", "lo", "!")) -> Script:
    """Every route that the gateway offers, in vLLM's words."""
    chat = stream(tokens)

    async def answer(reply: Reply) -> None:
        path = reply.request.path
        if path in ("/v1/chat/completions", "/v1/completions"):
            await chat(reply)
        elif path.startswith("/v1/audio/"):
            await _audio(reply, tokens)
        elif path in _STREAMS and reply.request.json().get("stream"):
            await send(reply, _STREAMS[path](tokens))
        else:
            await reply.json(_whole(path, tokens))

    return answer


_STREAMS: dict[str, Callable[[Sequence[str]], list[bytes]]] = {
    "/v1/messages": message_events,
    "/v1/responses": response_events,
}


async def send(reply: Reply, events: Sequence[bytes]) -> None:
    await reply.head()
    for piece in events:
        await reply.chunk(piece)
        await asyncio.sleep(0)
    await reply.end()


async def _audio(reply: Reply, words: Sequence[str]) -> None:
    body = reply.request.body.lower()
    if b'name="stream"\r\n\r\ntrue' in body:
        with_usage = b'name="stream_include_usage"\r\n\r\ntrue' in body
        await send(reply, transcription_events(words, with_usage=with_usage))
    else:
        await reply.json({"text": "".join(words), "usage": {"type": "duration", "seconds": 1}})


def _whole(path: str, tokens: Sequence[str]) -> dict[str, object]:
    prompt = {"prompt_tokens": PROMPT, "total_tokens": PROMPT}
    ranked = [{"index": 0, "document": {"text": "a"}, "relevance_score": 0.5}]
    scored = [{"index": 0, "object": "score", "score": 0.5}]
    embedded = [{"index": 0, "object": "embedding", "embedding": [0.5]}]
    answers: dict[str, dict[str, object]] = {
        "/v1/messages": message(tokens),
        "/v1/messages/count_tokens": {
            "input_tokens": PROMPT,
            "context_management": {"original_input_tokens": PROMPT},
        },
        "/v1/responses": response("completed", tokens),
        "/tokenize": {"count": 1, "max_model_len": 2048, "tokens": [1], "token_strs": None},
        "/detokenize": {"prompt": "a"},
        "/v1/embeddings": {"object": "list", "model": "m", "data": embedded, "usage": prompt},
    }
    if path.endswith("rerank"):
        return {"id": "rerank-1", "model": "m", "results": ranked, "usage": prompt}
    if path.endswith("score"):
        return {"id": "score-1", "object": "list", "model": "m", "data": scored, "usage": prompt}
    return answers[path]


def as_json(piece: bytes) -> object:
    """The data of one event."""
    line = next(line for line in piece.split(b"\n") if line.startswith(b"data: "))
    return json.loads(line[6:])
