"""The OpenAI-compatible routes: bodies go through byte for byte but for what must be spliced."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from vllm_gateway.errors import GatewayError, bad_request, openai_error, retry_hint
from vllm_gateway.policy import envelope
from vllm_gateway.policy.envelope import Span
from vllm_gateway.routing.pick import PREFIX_CHARACTERS
from vllm_gateway.routing.table import Model, Table
from vllm_gateway.settings import RequestLimits
from vllm_gateway.upstream import sse
from vllm_gateway.web.dialect import Account, Shortcut

STREAMING = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*STREAMING, "/v1/embeddings")
_KEYS = frozenset({"model", "stream", "stream_options", "messages", "prompt"})
_MAX_NAME = 256
_USAGE_ON = b'{"include_usage":true}'
_DONE = b"data: [DONE]\n\n"
_PASSED_ON = frozenset({400, 409, 413, 422})  # what the caller got wrong, in the engine's own words


@dataclass(frozen=True, slots=True)
class Request:
    """A body that has been understood. `strip_usage`: the usage event was asked for by the gateway alone."""

    name: str
    models: tuple[Model, ...]
    stream: bool
    strip_usage: bool
    body_for: Callable[[Model], bytes]
    prefix: Callable[[], str]


def understand(
    body: bytes, table: Table, limits: RequestLimits, *, can_stream: bool, default: str | None
) -> Request:
    """Reads what the gateway acts on. Raises GatewayError: 400, 404, or 503 while no model is known."""
    spans = envelope.find(body, _KEYS, max_depth=limits.json_depth, max_items=limits.json_items)
    name = _model_name(body, spans.get("model"))
    models = table.resolve(name) if name is not None else choose_default(table, default)
    stream = _flag(body, spans.get("stream"), "stream") and can_stream
    changes, strip = _ask_for_usage(body, spans) if stream else ([], False)
    model_span = spans.get("model")

    def body_for(model: Model) -> bytes:
        if model_span is None or name == model.upstream_name:
            return envelope.splice(body, changes) if changes else body
        return envelope.splice(body, [*changes, (model_span, json.dumps(model.upstream_name).encode())])

    public = name or models[0].public_name
    return Request(public, models, stream, strip, body_for, lambda: _prefix(body, spans))


def _prefix(body: bytes, spans: dict[str, Span]) -> str:
    """How the prompt begins, for routing; nothing where it has no text."""
    if "messages" in spans:
        return conversation_prefix(envelope.decode(body, spans["messages"], "messages"))
    prompt = envelope.decode(body, spans["prompt"], "prompt") if "prompt" in spans else None
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    return first[:PREFIX_CHARACTERS] if isinstance(first, str) else ""


def conversation_prefix(messages: object) -> str:
    """How the first user's message begins. System prompts are alike for all callers of an application, and
    the first message stays the same over the turns of a conversation.
    """
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    first = next((turn for turn in turns if turn.get("role") == "user"), turns[0] if turns else {})
    content = first.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return next((text[:PREFIX_CHARACTERS] for text in texts if isinstance(text, str)), "")


def choose_default(table: Table, default: str | None) -> tuple[Model, ...]:
    """The model of a request that names none: the configured one, or the only one."""
    if default is not None:
        return table.resolve(default)
    only = table.only()
    if only is not None:
        return (only,)
    if not table.models:
        return table.resolve("")  # raises: nothing is served, or nothing is known yet
    names = ", ".join(table.public_names())
    raise bad_request(f"Say which model you want; served here: {names}.", param="model")


def _model_name(body: bytes, span: Span | None) -> str | None:
    value = envelope.decode(body, span, "model") if span is not None else None
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise bad_request(f"'model' must be a string of 1 to {_MAX_NAME} characters.", param="model")
    return value


def _flag(body: bytes, span: Span | None, key: str) -> bool:
    value = envelope.decode(body, span, key) if span is not None else None
    if value is None or isinstance(value, bool):
        return bool(value)
    raise bad_request(f"{key!r} must be true or false.", param=key)  # vLLM would take "yes" and 1 too


def _ask_for_usage(body: bytes, spans: dict[str, Span]) -> tuple[list[tuple[Span, bytes]], bool]:
    """The change that makes the engine count tokens, and whether its usage event is ours to take out."""
    span = spans.get("stream_options")
    if span is None:
        return [envelope.prepend(body, b'"stream_options":' + _USAGE_ON)], True
    options = envelope.decode(body, span, "stream_options")
    if isinstance(options, dict) and options.get("include_usage") is True:
        return [], False
    if options is None or isinstance(options, dict):
        return [(span, _USAGE_ON)], True
    return [], False  # not valid: the engine says so


class OpenAIStream(Shortcut):
    """Events pass as they are; those that end, fail or account for a stream are looked into."""

    def __init__(self, *, strip_usage: bool) -> None:
        self.account = Account()
        self._strip_usage = strip_usage

    def block(self, block: bytes) -> bytes:
        # Inside JSON strings quotes are escaped, so a model's text cannot look like one of these. Four
        # searches of some 200 bytes cost a quarter of a microsecond; parsing each event costs ten times that.
        if (
            b'"choices":[]' in block
            or b'"finish_reason":"' in block
            or b"data: [DONE]" in block
            or b'"error"' in block
        ):
            return b"".join(event for event in sse.split(block) if self._keep(event))
        return block

    def has_token(self, block: bytes) -> bool:
        return any(_is_token(sse.data_of(event)) for event in sse.split(block))

    def end(self) -> bytes:
        return b"" if self.account.done else _DONE

    def failed(self, error: GatewayError) -> bytes:
        document = {"error": openai_error(error) | retry_hint(error)}
        return b"data: " + json.dumps(document).encode() + b"\n\n" + _DONE

    def _keep(self, event: bytes) -> bool:
        data = sse.data_of(event)
        if data == b"[DONE]":
            self.account.done = True
            return True
        document = _json_object(data)
        if document is None:
            return True
        if document.get("error"):
            self.account.failure = "in_band_error"
        usage, choices = document.get("usage"), document.get("choices")
        self.account.read_usage(usage)
        if isinstance(choices, list):
            self._read_finish(choices)
        return not (self._strip_usage and choices == [] and usage)

    def _read_finish(self, choices: list[object]) -> None:
        for choice in choices:
            reason = choice.get("finish_reason") if isinstance(choice, dict) else None
            if isinstance(reason, str):
                self.account.finish_reason = reason
                if reason == "abort":  # vLLM at SIGTERM: it looks like an end and is none
                    self.account.failure = "abort"


def _is_token(data: bytes | None) -> bool:
    """Not the first chunk of a chat, which only says who speaks."""
    if data is None:
        return False
    return not (b'"role":"' in data and (b'"content":""' in data or b'"content":null' in data))


def _json_object(data: bytes | None) -> dict[str, object] | None:
    if data is None:
        return None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


@dataclass(frozen=True, slots=True)
class OpenAIDialect:
    """One request in OpenAI's words."""

    limits: RequestLimits
    strip_usage: bool

    def stream(self) -> OpenAIStream:
        return OpenAIStream(strip_usage=self.strip_usage)

    def unary(self, body: bytes, account: Account) -> bytes:
        try:
            spans = envelope.find(body, {"usage"}, max_depth=1000, max_items=self.limits.answer_bytes)
            account.read_usage(envelope.decode(body, spans["usage"], "usage") if "usage" in spans else None)
        except GatewayError:
            pass  # not JSON (plain text, say): nothing to count
        return body

    def refusal(self, status: int, body: bytes) -> bytes | None:
        error = (_json_object(body) or {}).get("error")
        shaped = isinstance(error, dict) and isinstance(error.get("message"), str)
        return body if shaped and status in _PASSED_ON else None
