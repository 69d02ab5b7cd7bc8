"""The shape of a stream's ordinary token events, so that they need not be parsed or framed again one by one.

From one token to the next vLLM changes only the text: an event is a prefix, the text as a JSON string's
inside, and a suffix. What fits both, with no quote in between, is the same JSON document with another text,
whatever else it holds: no finish reason, no usage and no error can hide in it. Everything else is looked at
as a whole, elsewhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from vllm_gateway.json_value import json_value
from vllm_gateway.upstream.http1 import SIZES

_KEYS = tuple(
    (b'"%b":"' % name.encode(), name) for name in ("content", "text", "reasoning", "reasoning_content")
)
_DELTA = {"content", "reasoning", "reasoning_content", "role"}
_MARK = "\N{REPLACEMENT CHARACTER}"
# How vLLM's events begin. In place of this `id` and `created` any others make the same document but for them.
_OWN = re.compile(rb'data: \{"id":"[\w.-]*","object":("[\w.]*"),"created":[1-9][0-9]*,')
_MOST_KNOWN = 256


@dataclass(frozen=True, slots=True)
class Template:
    """`prefix` ends with the quote before the text, `suffix` begins with the one after it."""

    prefix: bytes
    suffix: bytes
    key: str

    def scan(self, data: bytes) -> tuple[int, list[bytes]]:
        """The chunks at the beginning of `data` that hold a token event each: where they end, and the texts.

        A text is the inside of a JSON string as the engine wrote it, escapes included.
        """
        prefix, suffix = self.prefix, self.suffix
        before, after, end = len(prefix), len(suffix), len(data)
        framed_suffix = suffix + b"\r\n"
        at, texts = 0, []
        while at < end:
            start = at + 5
            size = SIZES.get(data[at:start])
            if size is None:
                start = at + 4
                size = SIZES.get(data[at:start])
                if size is None:
                    break
            text, tail = start + before, start + size - after
            if text > tail or not (data.startswith(framed_suffix, tail) and data.startswith(prefix, start)):
                break
            inside = data[text:tail]
            if inside.find(b'"') >= 0 or inside.find(b"\n") >= 0 or inside.endswith(b"\\"):
                break
            texts.append(inside)
            at = start + size + 2
        return at, texts


class Templates:
    """Finds templates, and knows them again: an engine's streams differ in their `id` and `created` only, so
    that the next one's first token need not be parsed.
    """

    def __init__(self) -> None:
        self._known: set[tuple[bytes, bytes, bytes]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, event: bytes) -> Template | None:
        """The template of a token event; None if this is none, or one with more in it than a text."""
        if not event.startswith(b"data: {") or event.find(b"\n") != len(event) - 2:
            return None
        for key, name in _KEYS:
            before, found, rest = event.partition(key)
            if found:
                text, quote, after = rest.partition(b'"')
                template = Template(before + key, quote + after, name)
                return template if self._holds(template, event, text) else None
        return None

    def _holds(self, template: Template, event: bytes, text: bytes) -> bool:
        own = _OWN.match(template.prefix)
        if own is None or text.endswith(b"\\"):  # which may hide that the text goes on
            return _holds(template, event, text)
        shape = own[1], template.prefix[own.end() :], template.suffix
        if shape in self._known:
            return True
        if not _holds(template, event, text):
            return False
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(shape)
        return True


def _holds(template: Template, event: bytes, text: bytes) -> bool:
    """Whether another text in the same place makes a document that differs in just that text."""
    try:
        document = json_value(event[6:])
        other = json_value((template.prefix + _MARK.encode() + template.suffix)[6:])
        choice, changed = document["choices"][0], other["choices"][0]
        holder, changed_holder = choice.get("delta", choice), changed.get("delta", changed)
        if len(document["choices"]) != 1 or not _ordinary(document, choice):
            return False
        if changed_holder[template.key] != _MARK or holder[template.key] != json.loads(b'"%b"' % text):
            return False
        changed_holder[template.key] = holder[template.key]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return False
    return bool(document == other)


def _ordinary(document: dict[str, object], choice: dict[str, object]) -> bool:
    """No end, no error, no counts, no second text: nothing that anybody would have to look at."""
    if document.get("usage") is not None or "error" in document or choice.get("finish_reason") is not None:
        return False
    delta = choice.get("delta", {})
    if not isinstance(delta, dict) or not set(delta) <= _DELTA:
        return False
    return sum(isinstance(value, str) for value in delta.values()) <= 1
