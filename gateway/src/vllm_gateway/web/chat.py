"""The simple chat API: `POST /chat` and `POST /chat/stream`.

Its readers may be as simple as the example's React hook, which parses each read by itself: so a token is
one event, an event is at most 1,200 bytes (it fits a network packet), all of it is ASCII, every data line
is JSON, and the last one is `{"done": true}` however the stream ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_gateway.errors import GatewayError, bad_request, chat_error, retry_hint
from vllm_gateway.policy import envelope
from vllm_gateway.routing.table import Model, Table
from vllm_gateway.settings import RequestLimits
from vllm_gateway.upstream import sse
from vllm_gateway.web.dialect import Account, Shape, Shortcut
from vllm_gateway.web.openai import Request, choose_default, conversation_prefix

UPSTREAM_PATH = "/v1/chat/completions"
MAX_EVENT_BYTES = 1200
# The inside of a JSON string that is ASCII and fits one event: it may go into another one as it is.
_PLAIN = re.compile(
    rb'(?=.{1,%d}\Z)[ !#-\[\]-~]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[ !#-\[\]-~]*+)*+'
    % (MAX_EVENT_BYTES - 40)
)
_CHAT_KEYS = frozenset({"model", "message", "messages", "temperature", "max_tokens"})


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The body of `/chat` and `/chat/stream`: a message, or a conversation, or both."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"message": "Write a haiku about the sea"}}
    )

    message: str | None = Field(default=None, description="What the user says; comes after `messages`.")
    messages: list[ChatMessage] = Field(default_factory=list, description="The conversation so far.")
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="A name from `GET /models`; may be left out where one model is served."
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> ChatRequest:
        if self.message is None and not self.messages:
            raise ValueError("send 'message', 'messages' or both")
        return self

    def conversation(self) -> list[dict[str, str]]:
        turns = [turn.model_dump() for turn in self.messages]
        return turns if self.message is None else [*turns, {"role": "user", "content": self.message}]


class ChatUsage(BaseModel):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    """The answer of `/chat`."""

    response: str
    model: str
    finish_reason: str | None
    usage: ChatUsage


@dataclass(slots=True, kw_only=True)
class TranslatedRequest(Request):
    """One whose engine gets `options` in place of the body."""

    options: Mapping[str, Any]

    def body_for(self, model: Model) -> bytes:
        return json.dumps({"model": model.upstream_name, **self.options}).encode()

    def prefix(self) -> str:
        return conversation_prefix(self.options["messages"])

    def let_go(self) -> None:
        self.body, self.options = b"", {}


def understand(
    body: bytes, table: Table, limits: RequestLimits, *, stream: bool, default: str | None
) -> Request:
    """Reads and translates a body. Raises GatewayError."""
    envelope.find(body, _CHAT_KEYS, max_depth=limits.json_depth, max_items=limits.json_items)
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    models = table.resolve(chat.model) if chat.model is not None else choose_default(table, default)
    options: dict[str, Any] = {"messages": chat.conversation(), "stream": stream}
    if stream:
        options["stream_options"] = {"include_usage": True}
    options |= chat.model_dump(include={"temperature", "max_tokens"}, exclude_none=True)
    name = chat.model or models[0].public_name
    return TranslatedRequest(name, models, stream, strip_usage=False, body=body, options=options)


def _invalid(error: ValidationError) -> GatewayError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; known are message, messages, model, temperature and max_tokens"
    return bad_request(f"{where}: {message}." if where else f"{message}.", param=where or None)


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode("ascii") + b"\n\n"


def text_events(key: str, text: str) -> Iterator[bytes]:
    """`{key: text}` as one event, or as several where it would be larger than MAX_EVENT_BYTES."""
    room = MAX_EVENT_BYTES - len(event({key: ""}))
    while text:
        # A character is at most twelve bytes of escaped JSON: then a piece that may be too long is cut short.
        piece = text if len(text) * 12 <= room else _fitting(text, room)
        yield event({key: piece})
        text = text[len(piece) :]


def _name_of(key: str) -> str:
    return "reasoning" if key.startswith("reasoning") else "token"


def _shape(name: str) -> Shape:
    head, foot = b'data: {"%b": "' % name.encode(), b'"}\n\n'
    return Shape(head, foot, _PLAIN.fullmatch, len(head) + len(foot))


_SHAPES = {name: _shape(name) for name in ("reasoning", "token")}


def _retold(key: str, text: bytes) -> bytes:
    """The inside of a JSON string that is long, not ASCII or not quite JSON."""
    try:
        whole = json.loads(b'"%b"' % text)
    except ValueError:
        return b""
    return b"".join(text_events(key, whole))


def _fitting(text: str, room: int) -> str:
    """The longest beginning of `text` whose JSON fits; characters are never split."""
    used = 0
    for at, character in enumerate(text):
        used += len(json.dumps(character)) - 2
        if used > room:
            return text[:at]
    return text


class ChatStream(Shortcut):
    """vLLM's chunks as `{"token": …}` events."""

    verbatim = False

    def __init__(self, model: str) -> None:
        self.account = Account()
        self._model = model
        self._usage: dict[str, Any] | None = None

    def block(self, block: bytes) -> bytes:
        return b"".join(part for part in map(self._translate, sse.split(block)) if part)

    def rewrite(self, key: str, texts: Sequence[bytes]) -> bytes:
        shape, name = self.shape(key), _name_of(key)
        return b"".join(
            [
                b"%b%b%b" % (shape.head, text, shape.foot) if shape.fits(text) else _retold(name, text)
                for text in texts
                if text
            ]
        )

    def shape(self, key: str) -> Shape:
        return _SHAPES[_name_of(key)]

    def has_token(self, block: bytes) -> bool:
        return any(
            b'"content":"' in event and b'"content":""' not in event for event in sse.split(block)
        ) or (b'"reasoning' in block or self.account.done or self.account.failure is not None)

    def end(self) -> bytes:
        """The last event; an engine that failed in band has had its error event already."""
        reason = "error" if self.account.failure else self.account.finish_reason
        last: dict[str, Any] = {"done": True, "model": self._model, "finish_reason": reason}
        if self._usage is not None:
            last["usage"] = self._usage
        return event(last)

    def failed(self, error: GatewayError) -> bytes:
        self.account.failure = self.account.failure or error.code
        return event({"error": _clipped(chat_error(error)) | retry_hint(error)}) + self.end()

    def _translate(self, raw: bytes) -> bytes:
        data = sse.data_of(raw)
        if data is None:
            return raw  # a comment, which keeps the connection alive
        if data == b"[DONE]":
            self.account.done = True
            return b""
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            return b""
        if not isinstance(chunk, dict):
            return b""
        if chunk.get("error"):
            return self._failed_in_band(chunk["error"])
        self._read_usage(chunk.get("usage"))
        return b"".join(self._tokens(chunk.get("choices")))

    def _tokens(self, choices: object) -> Iterator[bytes]:
        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
        delta = _mapping(choice.get("delta"))
        yield from text_events("reasoning", _text(delta.get("reasoning") or delta.get("reasoning_content")))
        yield from text_events("token", _text(delta.get("content")))
        reason = _text(choice.get("finish_reason"))
        if reason:
            self.account.finish_reason = reason
        if reason == "abort":
            message = "The engine stopped before the answer was complete."
            yield self._failed_in_band({"message": message}, "abort")

    def _failed_in_band(self, error: object, label: str = "in_band_error") -> bytes:
        self.account.failure = label
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else "The engine failed."
        return event({"error": _clipped(chat_error(GatewayError(502, "engine_error", text)))})

    def _read_usage(self, usage: object) -> None:
        self.account.read_usage(usage)
        if isinstance(usage, dict):
            self._usage = usage_of(self.account)


def usage_of(account: Account) -> dict[str, int]:
    prompt, completion = account.prompt_tokens, account.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _clipped(error: dict[str, Any]) -> dict[str, Any]:
    """An error event is an event too, and has the same limit."""
    return error | {"message": _fitting(error["message"], MAX_EVENT_BYTES - 200)}


@dataclass(frozen=True, slots=True)
class ChatDialect:
    """One request of `/chat` or `/chat/stream`; `model` is the name that the caller sees."""

    model: str

    def stream(self, _engine: str = "", /) -> ChatStream:
        return ChatStream(self.model)

    def unary(self, body: bytes, account: Account) -> bytes:
        try:
            document = json.loads(body)
            choice = document["choices"][0]
            text = choice["message"]["content"] or ""
            account.read_usage(document.get("usage"))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise GatewayError(
                502, "engine_bad_response", "The engine's answer is no chat completion."
            ) from None
        answer = {"response": text, "model": self.model, "finish_reason": choice.get("finish_reason")}
        return json.dumps(answer | {"usage": usage_of(account)}).encode()

    def refusal(self, status: int, body: bytes) -> bytes | None:  # noqa: ARG002
        return None  # always in this family's shape
