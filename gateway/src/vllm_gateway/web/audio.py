"""`/v1/audio/*`: a form with an audio file, where `model` and `stream` are fields beside it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_gateway.errors import bad_request
from vllm_gateway.policy import multipart
from vllm_gateway.policy.envelope import Span
from vllm_gateway.routing.table import Table
from vllm_gateway.web.openai import Changes, Request, SplicedRequest, check_name, choose_default

ROUTES = ("/v1/audio/transcriptions", "/v1/audio/translations")
_USAGE = "stream_include_usage"
_FIELDS = frozenset({"model", "stream", _USAGE})
_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})  # what vLLM's parser, Pydantic, takes for a boolean
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})


@dataclass(slots=True, kw_only=True)
class FormRequest(SplicedRequest):
    """A form, whose fields are beside the file."""

    form: multipart.Form

    def renamed(self, name: str) -> Changes:
        if self.asked is None:
            return [*self.changes, self.form.addition("model", name)]
        return [*self.changes, (self.form.fields["model"], name.encode())]


def understand(body: bytes, content_type: bytes, table: Table, default: str | None) -> Request:
    """Reads what the gateway acts on. Raises GatewayError: 400, 404, or 503 while no model is known."""
    boundary = multipart.boundary_of(content_type)
    form = multipart.find(body, boundary, _FIELDS)
    name = form.value(body, "model")
    models = table.resolve(check_name(name)) if name is not None else choose_default(table, default)
    stream = _flag(body, form, "stream")
    changes, strip = _ask_for_usage(body, form) if stream else ([], False)
    kind = f'multipart/form-data; boundary="{boundary.decode("ascii")}"'
    public = name or models[0].public_name
    return FormRequest(public, models, stream, strip, body, kind, asked=name, form=form, changes=changes)


def _ask_for_usage(body: bytes, form: multipart.Form) -> tuple[list[tuple[Span, bytes]], bool]:
    """The change that makes the engine count tokens, and whether its usage event is ours to take out."""
    if _USAGE not in form.fields:
        return [form.addition(_USAGE, "true")], True
    if _flag(body, form, _USAGE):
        return [], False
    return [(form.fields[_USAGE], b"true")], True


def _flag(body: bytes, form: multipart.Form, name: str) -> bool:
    value = form.value(body, name)
    word = (value or "false").lower()
    if word not in _TRUE | _FALSE:
        raise bad_request(f"The field {name!r} must be true or false.", param=name)
    return word in _TRUE
