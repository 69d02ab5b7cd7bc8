"""The OpenAI-compatible routes: bodies go through byte for byte but for what must be spliced."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_gateway.errors import GatewayError, bad_request, openai_error, retry_hint
from vllm_gateway.json_value import json_value
from vllm_gateway.policy import envelope
from vllm_gateway.policy.envelope import Span
from vllm_gateway.routing.pick import PREFIX_CHARACTERS
from vllm_gateway.routing.table import Model, Table
from vllm_gateway.settings import RequestLimits
from vllm_gateway.upstream import sse
from vllm_gateway.web.dialect import Account, Shortcut

_STORED = ("background", "previous_response_id")
_KEYS = frozenset({"model", "stream", "stream_options", "messages", "prompt", "input", *_STORED})
_MAX_NAME = 256
_USAGE_ON = b'{"include_usage":true}'
_DONE = b"data: [DONE]\n\n"
_PASSED_ON = frozenset({400, 409, 413, 422})  # what the caller got wrong, in the engine's own words


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a route's bodies the gateway acts on.

    `ask_usage`: a stream has its token counts only where `stream_options` asks for them. `stored`: a body may
    refer to what one replica keeps in its memory.
    """

    streams: bool = False
    ask_usage: bool = False
    stored: bool = False


@dataclass(slots=True)  # not frozen: each request builds one, and freezing costs a call a field
class Request(ABC):
    """A body that has been understood. `strip_usage`: the usage event was asked for by the gateway alone."""

    name: str
    models: tuple[Model, ...]
    stream: bool
    strip_usage: bool
    body: bytes
    content_type: str = "application/json"

    @abstractmethod
    def body_for(self, model: Model) -> bytes:
        """What the engine of `model` gets."""

    def prefix(self) -> str:
        """How the prompt begins, for routing; nothing where that cannot be known."""
        return ""

    def let_go(self) -> None:
        """Nobody asks for the body any more: a stream may go on for long, and a body may hold images."""
        self.body = b""


Changes = Sequence[tuple[Span, bytes]]


@dataclass(slots=True, kw_only=True)
class SplicedRequest(Request):
    """One whose body goes on as it came, but for `changes` and the engine's name of the model. `asked` is the
    name that it has itself.
    """

    asked: str | None
    changes: Changes

    def body_for(self, model: Model) -> bytes:
        if self.asked == model.upstream_name or (self.asked is None and not model.adapter):
            return envelope.splice(self.body, self.changes) if self.changes else self.body
        return envelope.splice(self.body, self.renamed(model.upstream_name))

    @abstractmethod
    def renamed(self, name: str) -> Changes:
        """The changes, with the one to the model's name."""


@dataclass(slots=True, kw_only=True)
class JsonRequest(SplicedRequest):
    """`spans`: where in the body is what the gateway acts on."""

    spans: Mapping[str, Span]

    def renamed(self, name: str) -> Changes:
        value, span = json.dumps(name).encode(), self.spans.get("model")
        if span is None:
            return [envelope.prepend(self.body, b'"model":' + value), *self.changes]
        return [*self.changes, (span, value)]

    def prefix(self) -> str:
        return _prefix(self.body, self.spans)


def understand(
    body: bytes, table: Table, limits: RequestLimits, reading: Reading, default: str | None
) -> Request:
    """Reads what the gateway acts on. Raises GatewayError: 400, 404, or 503 while no model is known."""
    spans = envelope.find(body, _KEYS, max_depth=limits.json_depth, max_items=limits.json_items)
    name = _model_name(body, spans.get("model"))
    models = table.resolve(name) if name is not None else choose_default(table, default)
    stream = reading.streams and _flag(body, spans.get("stream"), "stream")
    changes, strip = _ask_for_usage(body, spans) if stream and reading.ask_usage else ([], False)
    if reading.stored:
        _refuse_stored(body, spans, models)
    public = name or models[0].public_name
    return JsonRequest(public, models, stream, strip, body, asked=name, spans=spans, changes=changes)


def _prefix(body: bytes, spans: Mapping[str, Span]) -> str:
    """How the prompt begins, for routing; nothing where it has no text."""
    key = next((key for key in ("messages", "prompt", "input") if key in spans), None)
    if key is None:
        return ""
    value = envelope.decode(body, spans[key], key)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return conversation_prefix(value)
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
    return None if value is None else check_name(value)


def check_name(value: object) -> str:
    """The name of a model, as a caller gives it. Raises a 400."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise bad_request(f"'model' must be a string of 1 to {_MAX_NAME} characters.", param="model")
    return value


def _refuse_stored(body: bytes, spans: Mapping[str, Span], models: tuple[Model, ...]) -> None:
    """A 400 where a request refers to what another replica may hold: it would be found only by luck."""
    replicas = sum(len(model.endpoints) for model in models)
    given = (key for key in _STORED if key in spans and envelope.decode(body, spans[key], key))
    key = next(given, None) if replicas > 1 else None
    if key is not None:
        raise stored_elsewhere(repr(key), replicas, key)


def stored_elsewhere(what: str, replicas: int, param: str | None = None) -> GatewayError:
    text = (
        f"{what} needs a stored response, which one replica keeps in its memory, and this model has "
        f"{replicas}. Send the whole conversation in 'input' instead."
    )
    return bad_request(text, param=param, code="stored_responses_not_offered")


def stored_not_kept(what: str) -> GatewayError:
    """For whoever wants a stored response back: `what` is the request."""
    text = (
        f"{what} needs a stored response, which one replica of an engine has in its memory: they are not "
        "offered here. Read the answer of POST /v1/responses, and send the whole conversation in 'input'."
    )
    return bad_request(text, code="stored_responses_not_offered")


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


class Fingerprints:
    """What each engine has for a `system_fingerprint`, learnt from its usage events, for so many engines."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def of(self, engine: str) -> str | None:
        return self._known.get(engine)

    def learn(self, engine: str, fingerprint: str) -> None:
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[engine] = fingerprint


class OpenAIStream(Shortcut):
    """Events pass as they are; those that end, fail or account for a stream are looked into.

    vLLM puts its `system_fingerprint` into the very last event, the usage event, and had nobody asked for
    usage into each that finishes a choice. So where the usage event is taken out, those that finish wait for
    it (`holds`). Of several choices (`n`) only the last ones do: an event of a choice that goes on sends what
    waits before it, with the fingerprint that `engine` had before, or without one in its first stream.
    """

    def __init__(
        self, *, strip_usage: bool, fingerprints: Fingerprints | None = None, engine: str = ""
    ) -> None:
        self.account = Account()
        self._strip_usage = strip_usage
        self._fingerprints = fingerprints or Fingerprints()
        self._engine = engine
        self._finishing: list[bytes] = []

    def block(self, block: bytes) -> bytes:
        # Inside JSON strings quotes are escaped, so a model's text cannot look like one of these. Four
        # searches of some 200 bytes cost a quarter of a microsecond; parsing each event costs ten times that.
        if (
            block.find(b'"choices":[]') >= 0
            or block.find(b'"finish_reason":"') >= 0
            or block.find(b"data: [DONE]") >= 0
            or block.find(b'"error"') >= 0
        ):
            return b"".join(map(self._passed, sse.split(block)))
        return self._released_early() + block if self.holds and sse.has_data(block) else block

    def has_token(self, block: bytes) -> bool:
        for event in sse.split(block):
            # Not the first chunk of a chat, which only says who speaks.
            speaker = event.find(b'"role":"') >= 0 and (
                event.find(b'"content":""') >= 0 or event.find(b'"content":null') >= 0
            )
            if not speaker and sse.has_data(event):
                return True
        return False

    def end(self) -> bytes:
        last = b"" if self.account.done else _DONE
        return self._released(None) + last if self.holds else last

    def failed(self, error: GatewayError) -> bytes:
        document = {"error": openai_error(error) | retry_hint(error)}
        return self._released(None) + b"data: " + json.dumps(document).encode() + b"\n\n" + _DONE

    def _passed(self, event: bytes) -> bytes:
        """What is sent for one event, now."""
        data = sse.data_of(event)
        if data == b"[DONE]":
            self.account.done = True
            return self._released(None) + event if self.holds else event
        document = json_object(data)
        if document is None:
            return self._released_early() + event if self.holds and data is not None else event
        if document.get("error"):
            self.account.failure = "in_band_error"
        usage, choices = document.get("usage"), document.get("choices")
        if usage:
            self.account.read_usage(usage)
        finishes = bool(choices) and isinstance(choices, list) and self._read_finish(choices)
        if not self._strip_usage:
            return event
        if choices == [] and usage:
            return self._released(document.get("system_fingerprint"))
        if finishes and usage:  # the engine was started to count in every event: the last is not ours to take
            self._strip_usage = False
        if not finishes or usage:
            return self._released_early() + event if self.holds else event
        self._finishing.append(event)
        self.holds = True
        return b""

    def _released_early(self) -> bytes:
        return self._released(self._fingerprints.of(self._engine))

    def _released(self, fingerprint: object) -> bytes:
        events, self._finishing = self._finishing, []
        self.holds = False
        if isinstance(fingerprint, str):
            self._fingerprints.learn(self._engine, fingerprint)
            events = [_with_fingerprint(event, json.dumps(fingerprint).encode()) for event in events]
        return b"".join(events)

    def _read_finish(self, choices: list[object]) -> bool:
        finishes = False
        for choice in choices:
            reason = choice.get("finish_reason") if isinstance(choice, dict) else None
            if isinstance(reason, str):
                finishes, self.account.finish_reason = True, reason
                if reason == "abort":  # vLLM at SIGTERM: it looks like an end and is none
                    self.account.failure = "abort"
        return finishes


def _with_fingerprint(event: bytes, value: bytes) -> bytes:
    """As vLLM writes it: a field of the chunk, after the others."""
    if b'"system_fingerprint":null' in event:
        return event.replace(b'"system_fingerprint":null', b'"system_fingerprint":' + value)
    before, closing, after = event.rpartition(b"}")
    return before + b',"system_fingerprint":' + value + closing + after


def json_object(data: bytes | None) -> dict[str, object] | None:
    if data is None:
        return None
    try:
        document = json_value(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def count_whole(body: bytes, account: Account, limits: RequestLimits) -> None:
    """Reads the usage of an answer that is no stream, in any family's words."""
    try:
        spans = envelope.find(body, {"usage"}, max_depth=1000, max_items=limits.answer_bytes)
        account.read_usage(envelope.decode(body, spans["usage"], "usage") if "usage" in spans else None)
    except GatewayError:
        pass  # not JSON (plain text, say): nothing to count


@dataclass(slots=True)  # not frozen, as Request
class OpenAIDialect:
    """One request in OpenAI's words."""

    limits: RequestLimits
    strip_usage: bool
    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    def stream(self, engine: str = "", /) -> OpenAIStream:
        return OpenAIStream(strip_usage=self.strip_usage, fingerprints=self.fingerprints, engine=engine)

    def unary(self, body: bytes, account: Account) -> bytes:
        count_whole(body, account, self.limits)
        return body

    def refusal(self, status: int, body: bytes) -> bytes | None:
        error = (json_object(body) or {}).get("error")
        shaped = isinstance(error, dict) and isinstance(error.get("message"), str)
        return body if shaped and status in _PASSED_ON else None
